"""explain and search on packed blocks: every byte leads to its document, across pieces, and padding is no text."""

import json
import random
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_explain_pages import Page

from clm.__main__ import main as clm
from clm.block_text import read_block
from clm.explain import explain_step, open_text
from clm.explain_html import render
from clm.search import TextPattern, find_token
from data_prep.__main__ import main
from data_prep.blocks import Blocks
from data_prep.documents import DocumentMap
from data_prep.vocabulary import Vocabulary

BLOCK = 16


@pytest.fixture(scope="module", params=["best_fit", "pad"])
def packed(request, prepared, tmp_path_factory):
    """(texts, folder): documents of some to a hundred tokens in blocks of 16; the tokenizer pads with its EOS."""
    folder = tmp_path_factory.mktemp("packed_text")
    rng = random.Random(1)
    texts = ["The river " * 30, *("".join(rng.choices("ab é🙂[EOT]", k=rng.randint(1, 60))) for _ in range(150))]
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = shutil.copytree(prepared.tokenizer, folder / "tokenizer")
    config = tokenizer / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": "[EOT]"}))
    options = ["--tokenizer", tokenizer, "--block-size", BLOCK, "--val-fraction", 0, "--num-proc", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.packing.WINDOW_TOKENS", 500)
        patch.setattr("data_prep.packing.MIN_WINDOW_BLOCKS", 2)
        patch.setattr("data_prep.align.SHARD_TOKENS", 8 * BLOCK)
        arguments = ["prep", folder / "x.jsonl", *options, "--packing", request.param, "--out", folder / "data"]
        assert main([str(each) for each in arguments]) == 0
    return texts, folder / "data"


@pytest.fixture(scope="module")
def opened(packed):
    texts, folder = packed
    vocabulary = Vocabulary(folder)
    return texts, Blocks(folder, "train"), DocumentMap(folder, "train"), vocabulary


@pytest.fixture(scope="module")
def bytes_of_documents(opened):
    """Each document's bytes for itself, and where the tokens lie that they come from, as (position, byte of it)."""
    texts, blocks, documents, vocabulary = opened
    out = []
    for number, text in enumerate(texts):
        document = documents.document(number)
        ranges = documents.ranges(document.first_token, document.end_token)
        positions = np.concatenate([np.arange(*each) for each in ranges]).tolist()
        pieces = [vocabulary.table[i] for i in blocks.token_at(np.array(positions)).tolist()]
        owner = [(p, at) for p, piece in zip(positions, pieces, strict=True) for at in range(len(piece))]
        assert b"".join(pieces) == text.encode()
        out.append((text.encode(), owner))
    return out


def found_by_hand(bytes_of_documents, wanted: bytes):
    """All occurrences as (position, offset, last position)."""
    out = []
    for data, owner in bytes_of_documents:
        at = 0
        while (at := data.find(wanted, at)) >= 0:
            out.append((*owner[at], owner[at + len(wanted) - 1][0]))
            at += 1
    return sorted(out)


@settings(max_examples=25, deadline=None)
@given(text=st.one_of(st.text("ab é🙂", min_size=1, max_size=6), st.sampled_from(["The river " * 9, "[EOT]", "r T"])))
def test_every_occurrence_is_found_across_pieces_and_nothing_else(opened, bytes_of_documents, text):
    _, blocks, documents, vocabulary = opened
    matches = TextPattern(text.encode(), vocabulary.table).find(blocks, lambda n: None, documents)
    found = [tuple(map(int, each)) for m in matches for each in zip(m.first, m.offset, m.last, strict=True)]
    assert sorted(found) == found_by_hand(bytes_of_documents, text.encode())


def test_padding_is_no_occurrence_of_the_token_that_it_is_written_as(opened):
    texts, blocks, _, vocabulary = opened
    assert blocks.fill_token_id == vocabulary.eos_token_id and blocks.padding_fraction > 0
    matches = list(find_token(vocabulary.eos_token_id, blocks, lambda n: None))
    assert sum(len(each.first) for each in matches) == len(texts)


def test_every_byte_of_every_document_is_in_one_part(opened):
    texts, blocks, documents, vocabulary = opened
    parts = []
    for number in range(blocks.num_blocks):
        block = read_block(blocks, documents, "x", number, vocabulary.lengths)
        assert sum(part.end_token - part.first_token for part in block.parts) == block.num_tokens
        for part in block.parts:
            ids = block.tokens[part.first_token - number * BLOCK : part.end_token - number * BLOCK]
            text = texts[part.document.record].encode()
            assert text[part.first_byte : part.end_byte] == b"".join(vocabulary.table[i] for i in ids)
            assert part.piece.is_begun == (part.piece.offset > 0)
            assert part.piece.goes_on == (ids[-1] != vocabulary.eos_token_id)
            parts.append((part.document.record, part.first_byte, part.end_byte))
    reached = [0] * len(texts)
    for record, first, end in sorted(parts):
        assert first == reached[record]
        reached[record] = end
    assert reached == [len(text.encode()) for text in texts]


def test_a_text_in_two_pieces_is_shown_with_both_blocks_and_their_steps(packed, started, capsys):
    _, folder = packed
    data = [f"data.mixture=[{{dataset: {folder}}}]", "data.validation=[]", f"data.block_size={BLOCK}"]
    run = started(*data, "data.tokens=128", "data.tokens_per_step=64", "training.per_device_train_batch_size=4")
    assert clm(["explain", str(run), "--grep", "river " + "The river " * 20, "--limit", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(", where it begins: ") >= 1 and printed.count(", where it goes on: ") >= 2
    assert "[BOT]The river The" in printed and "x.jsonl, record 0, from byte 4" in printed
    (folder / "documents" / "train-pieces.arrow").rename(folder / "away")
    try:
        assert clm(["explain", str(run), "--grep", "The river", "--limit", "1"]) == 0
        assert "train-pieces.arrow is missing or damaged" in capsys.readouterr().out
    finally:
        (folder / "away").rename(folder / "documents" / "train-pieces.arrow")


def test_a_page_shows_the_text_of_padded_blocks_and_how_much_padding_there_is(packed, started):
    _, folder = packed
    data = [f"data.mixture=[{{dataset: {folder}}}]", "data.validation=[]", f"data.block_size={BLOCK}"]
    text = open_text(started(*data, "data.tokens_per_step=512", "training.per_device_train_batch_size=4"))
    explanation = explain_step(text, 2, None)
    page = Page(render(explanation))
    shown = "".join("".join(text.vocabulary.texts(block.tokens[: block.num_tokens])) for block in explanation.blocks)
    assert page.pre.replace("\n", "") == shown.replace("\n", "")
    assert any(block.num_tokens < BLOCK for block in explanation.blocks)
    assert "tokens of padding" in render(explanation)
