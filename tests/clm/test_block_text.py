"""A block as text: byte ranges slice the tokenized text exactly, whatever Unicode the corpus holds."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from clm.block_text import Vocabulary, count_bytes, describe_part, find_parts, read_block, show_unseen
from data_prep.__main__ import main
from data_prep.blocks import Blocks
from data_prep.documents import DocumentMap
from data_prep.token_bytes import differences_from_source, token_byte_lengths, token_bytes

TEXTS = st.lists(st.text(max_size=60), min_size=1, max_size=40)


def prepare(folder, tokenizer, texts, block_size=8):
    """Texts as a prepared dataset of small blocks."""
    folder.mkdir(exist_ok=True)
    number = len(list(folder.iterdir()))
    source, out = folder / f"{number}.jsonl", folder / f"data-{number}"
    rows = [{"text": text, "url": f"https://example.org/{i}"} for i, text in enumerate(texts)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--block-size", str(block_size), "--val-fraction", "0", "--out", str(out), "--num-proc", "1"]
    assert main(["prep", str(source), "--tokenizer", str(tokenizer), *options]) == 0
    return out


def check_every_range(data, as_tokenized, texts):
    """Every part of every block slices its document's text, and the parts of a document leave nothing out."""
    blocks, documents = Blocks(data, "train"), DocumentMap(data, "train")
    vocabulary = Vocabulary(AutoTokenizer.from_pretrained(data / "tokenizer"))
    reached = {}
    for number in range(blocks.num_blocks):
        block = read_block(blocks, documents, "x", number, vocabulary.lengths)
        assert [part.first_token for part in block.parts[1:]] == [part.end_token for part in block.parts[:-1]]
        assert (block.parts[0].first_token, block.parts[-1].end_token) == (number * 8, number * 8 + 8)
        for part in block.parts:
            text = as_tokenized(texts[part.document.record]).encode()
            ids = block.tokens[part.first_token - number * 8 : part.end_token - number * 8]
            assert text[part.first_byte : part.end_byte] == b"".join(vocabulary.table[i] for i in ids)
            assert part.first_byte == reached.get(part.document.number, 0)
            reached[part.document.number] = part.end_byte
            if part.end_token == part.document.end_token:
                assert part.end_byte == len(text)
    return reached


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """A SentencePiece-BPE with byte fall-back, of Llama 2's making."""
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("é", "▁")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "é"]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    folder = tmp_path_factory.mktemp("sentencepiece")
    loaded = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    loaded.save_pretrained(folder)
    return folder


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=TEXTS)
def test_ranges_slice_the_text_of_a_byte_level_bpe(prepared, tmp_path_factory, texts):
    texts = [*texts, "[EOT] naïve 東京 🙂\u200d e\u0301\r\n\0\x1b"]
    check_every_range(prepare(tmp_path_factory.mktemp("x"), prepared.tokenizer, texts), lambda text: text, texts)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=TEXTS)
def test_ranges_slice_the_text_of_a_sentencepiece_bpe_as_it_was_tokenized(sentencepiece, tmp_path_factory, texts):
    texts = [*texts, "ab a é ▁ 東京 </s>\0"]
    data = prepare(tmp_path_factory.mktemp("x"), sentencepiece, texts)
    check_every_range(data, lambda text: " " + text.replace("▁", " "), texts)


def test_differences_from_the_source_are_said(prepared, sentencepiece, tmp_path):
    assert differences_from_source(AutoTokenizer.from_pretrained(prepared.tokenizer)) == []
    space, mark = differences_from_source(AutoTokenizer.from_pretrained(sentencepiece))
    assert "space in front" in space and "▁" in mark
    raw = json.loads((prepared.tokenizer / "tokenizer.json").read_text())
    raw["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    raw["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    config = (prepared.tokenizer / "tokenizer_config.json").read_bytes()
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    space, normal = differences_from_source(AutoTokenizer.from_pretrained(tmp_path))
    assert "space in front" in space and "Lowercase, NFC" in normal


def test_the_bytes_of_all_tokens_of_a_byte_level_bpe_hold_every_byte_once_alone(prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer)
    table = token_bytes(tokenizer)
    assert table[:4] == [b""] * 4 and sorted(each for each in table if len(each) == 1) == [
        bytes([byte]) for byte in range(256)
    ]
    assert token_byte_lengths(tokenizer).tolist() == [len(each) for each in table]


def test_a_character_belongs_to_the_token_that_completes_it(prepared):
    vocabulary = Vocabulary(AutoTokenizer.from_pretrained(prepared.tokenizer))
    one = {each: vocabulary.table.index(each) for each in [bytes([byte]) for byte in "é🙂a".encode()]}
    ids = [one[bytes([byte])] for byte in "é🙂a".encode()]
    assert vocabulary.texts(np.array(ids)) == ["", "é", "", "", "", "🙂", "a"]
    assert vocabulary.texts(np.array(ids[1:4])) == ["�", "", "�"]  # a block that begins and ends inside a character
    assert vocabulary.texts(np.array([0, ids[0], 1])) == ["[BOT]", "�", "[EOT]"]
    assert [vocabulary.show(token) for token in (1, ids[0], ids[-1])] == ["[EOT]", "b'\\xc3'", "'a'"]


def test_text_that_would_steer_a_terminal_is_shown_instead():
    assert show_unseen("a\tb\nc\r\x1b[31m\x7f\x9b\u202eé") == "a\tb\nc␍␛[31m␡<U+009B><U+202E>é"


def test_a_part_is_described_by_file_record_bytes_and_kept_columns(prepared):
    blocks, documents = Blocks(prepared.folder, "train"), DocumentMap(prepared.folder, "train")
    lengths = Vocabulary(AutoTokenizer.from_pretrained(prepared.tokenizer)).lengths
    last = blocks.num_tokens
    *_, part = find_parts(blocks, documents, lengths, last - 64, last)
    assert describe_part(part).startswith(
        f"corpus/pages.jsonl, record {part.document.record}, bytes {part.first_byte}-"
    )
    assert describe_part(part).endswith(f", url https://example.org/{part.document.record}")
    assert count_bytes(blocks, lengths, 0, last) == sum(
        part.end_byte - part.first_byte for part in find_parts(blocks, documents, lengths, 0, last)
    )
