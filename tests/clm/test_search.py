"""A search finds every occurrence, across rows, blocks and shards, and nothing else: compared with all bytes joined."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clm import search
from clm.search import TextPattern, find_token
from data_prep import align
from data_prep.__main__ import main
from data_prep.blocks import Blocks
from data_prep.vocabulary import Vocabulary

BLOCK = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards of 8 blocks of 16 tokens, whose vocabulary knows many ways to spell a's and b's; looked at 50 at once."""
    folder = tmp_path_factory.mktemp("search")
    rng = random.Random(1)
    texts = ["[EOT]", "a" * 200, *("".join(rng.choices("aab é🙂", k=rng.randint(1, 60))) for _ in range(400))]
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--tokenizer", "train:290", "--block-size", str(BLOCK), "--val-fraction", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "SHARD_TOKENS", 8 * BLOCK)
        assert main(["prep", str(folder / "x.jsonl"), *options, "--out", str(folder / "data"), "--num-proc", "1"]) == 0
        patch.setattr(search, "_CHUNK", 50)
        blocks = Blocks(folder / "data", "train")
        assert len(blocks.shard_starts) > 20
        yield blocks, Vocabulary(folder / "data").table


def found(blocks, table, text):
    looked_at = []
    matches = list(TextPattern(text, table).find(blocks, looked_at.append))
    assert sum(looked_at) == blocks.num_tokens
    return [
        (int(first), int(offset), int(last))
        for each in matches
        for first, offset, last in zip(each.first, each.offset, each.last, strict=True)
    ]


def found_by_hand(blocks, table, text):
    """All bytes of the split as one text, a byte that is in no text for each control token, and a walk through it."""
    ids = blocks.token_at(np.arange(blocks.num_tokens)).tolist()
    pieces = [table[i] or b"\xff" for i in ids]
    owner = [(number, at) for number, piece in enumerate(pieces) for at in range(len(piece))]
    joined, at, out = b"".join(pieces), 0, []
    while (at := joined.find(text, at)) >= 0:
        out.append((*owner[at], owner[at + len(text) - 1][0]))
        at += 1
    return out


@settings(max_examples=80, deadline=None)
@given(text=st.one_of(st.text("ab é🙂", min_size=1, max_size=12), st.text("a", min_size=1, max_size=60)))
def test_every_occurrence_is_found_and_nothing_else(data, text):
    assert found(*data, text.encode()) == found_by_hand(*data, text.encode())


def test_what_crosses_a_block_or_a_shard_is_found(data):
    blocks, table = data
    ids = blocks.token_at(np.arange(blocks.num_tokens))
    borders, shards = range(3 * BLOCK, blocks.num_tokens, 5 * BLOCK), set((blocks.shard_starts * BLOCK).tolist())
    crossed = {True: 0, False: 0}
    for border in borders:
        around = ids[border - 4 : border + 4].tolist()
        if all(table[i] for i in around):
            text = b"".join(table[i] for i in around)
            assert (border - 4, 0, border + 3) in found(blocks, table, text)
            crossed[border in shards] += 1
    assert min(crossed.values()) > 2


def test_no_occurrence_crosses_a_control_token(data):
    blocks, table = data
    ids = blocks.token_at(np.arange(blocks.num_tokens)).tolist()
    end = ids.index(1)  # [EOT], and [BOT] behind it
    text = table[ids[end - 1]] + table[ids[end + 2]]
    assert all((first, last) != (end - 1, end + 2) for first, _, last in found(blocks, table, text))
    assert len(found(blocks, table, b"[EOT]")) == 1  # the text that looks like it


def test_a_part_of_a_character_and_a_text_of_no_token_are_found_too(data):
    assert found(*data, "🙂".encode()[1:3]) == found_by_hand(*data, "🙂".encode()[1:3]) != []
    assert found(*data, b"z") == [] and found(*data, b"a" * 1000) == []


def test_every_position_of_a_token_is_found(data):
    blocks, _ = data
    ids = blocks.token_at(np.arange(blocks.num_tokens))
    for token in (0, 1, int(ids[5])):
        matches = list(find_token(token, blocks, lambda n: None))
        assert np.concatenate([each.first for each in matches]).tolist() == np.flatnonzero(ids == token).tolist()
