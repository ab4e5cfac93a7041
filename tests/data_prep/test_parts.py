"""The documents of a token range: byte ranges slice the tokenized text exactly, whatever Unicode the corpus holds."""

import json

import numpy as np
import pytest
from conftest import main, run_here, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.blocks import Blocks
from data_prep.documents import DocumentMap
from data_prep.parts import count_bytes, describe_part, find_parts, parts_between
from data_prep.token_bytes import backend_differences, token_byte_lengths
from data_prep.vocabulary import Vocabulary, show_unseen

TEXTS = st.lists(st.text(max_size=60), min_size=1, max_size=40)
HOSTILE = "[EOT] naïve 東京 ▁ ab a é 🙂\u200d É E\u0301 İ ﬁ </s>\r\n\0\x1b"
FEW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
BLOCK_SIZE = 8


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


def with_changes(tokenizer, folder, **changes):
    """A tokenizer's folder again, with other parts in its tokenizer.json."""
    folder.mkdir(exist_ok=True)
    raw = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**raw, **changes}), encoding="utf-8")
    (folder / "tokenizer_config.json").write_bytes((tokenizer / "tokenizer_config.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def normalising(tmp_path_factory, small_tokenizer):
    """A byte-level BPE that composes characters and makes them small."""
    normalizer = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    return with_changes(small_tokenizer, tmp_path_factory.mktemp("normalising"), normalizer=normalizer)


def prepare(folder, tokenizer, texts):
    """Texts as a prepared dataset of small blocks."""
    source = write_jsonl(folder / "x.jsonl", texts, url=[f"https://example.org/{i}" for i in range(len(texts))])
    options = ("--block-size", BLOCK_SIZE, "--val-fraction", 0, "--num-proc", 1, "--out", folder / "data")
    run_here("prep", source, "--tokenizer", tokenizer, *options)
    return folder / "data"


def check_every_range(data, as_tokenized, texts):
    """Every part of every block slices its document's text, and the parts of a document leave nothing out."""
    blocks, documents, vocabulary = Blocks(data, "train"), DocumentMap(data, "train"), Vocabulary(data)
    reached = {}
    for number in range(blocks.num_blocks):
        first, end = number * BLOCK_SIZE, (number + 1) * BLOCK_SIZE
        parts = find_parts(blocks, documents, vocabulary.lengths, first, end)
        assert [part.first_token for part in parts[1:]] == [part.end_token for part in parts[:-1]]
        assert (parts[0].first_token, parts[-1].end_token) == (first, end)
        for part in parts:
            text = as_tokenized(texts[part.document.record]).encode()
            ids = blocks.token_at(np.arange(part.first_token, part.end_token))
            assert text[part.first_byte : part.end_byte] == b"".join(vocabulary.table[i] for i in ids)
            assert part.first_byte == reached.get(part.document.number, 0)
            reached[part.document.number] = part.end_byte
            assert part.num_bytes == (len(text) if part.document.end_token <= blocks.num_tokens else None)
            if part.end_token == part.document.end_token:
                assert part.end_byte == len(text)


@FEW
@given(texts=TEXTS)
def test_ranges_slice_the_text_of_a_byte_level_bpe(small_tokenizer, tmp_path_factory, texts):
    texts = [*texts, HOSTILE]
    check_every_range(prepare(tmp_path_factory.mktemp("x"), small_tokenizer, texts), lambda text: text, texts)


@FEW
@given(texts=TEXTS)
def test_ranges_slice_the_text_of_a_sentencepiece_bpe_as_it_was_tokenized(sentencepiece, tmp_path_factory, texts):
    texts = [*texts, HOSTILE]
    data = prepare(tmp_path_factory.mktemp("x"), sentencepiece, texts)
    check_every_range(data, lambda text: " " + text.replace("▁", " "), texts)


@FEW
@given(texts=TEXTS)
def test_ranges_slice_the_text_of_a_normalising_tokenizer_as_it_was_tokenized(normalising, tmp_path_factory, texts):
    texts = [*texts, HOSTILE]
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    check_every_range(prepare(tmp_path_factory.mktemp("x"), normalising, texts), normalizer.normalize_str, texts)


@pytest.mark.parametrize(
    ("name", "shown", "said"),
    [
        ("small_tokenizer", "bytes 0-13 of 13, url https://example.org/1\n[BOT]Écru e\u0301 ▁[EOT]", []),
        (
            "sentencepiece",
            "bytes 0-12 of 12 as tokenized (13 in the source), url https://example.org/1\n Écru e\u0301  </s>",
            ["puts a space in front of a text: ranges count one byte more", "reads the character ▁"],
        ),
        (
            "normalising",
            "bytes 0-12 of 12 as tokenized (13 in the source), url https://example.org/1\n[BOT]écru é ▁[EOT]",
            ["normalises text first (Lowercase, NFC)"],
        ),
    ],
    ids=lambda value: value if value in ("small_tokenizer", "sentencepiece", "normalising") else "",
)
def test_the_documents_of_a_token_range_by_command_and_by_call(request, tmp_path, capsys, name, shown, said):
    data = prepare(tmp_path, request.getfixturevalue(name), ["one", "Écru e\u0301 ▁", "three " * 9])
    document = DocumentMap(data, "train").document(1)
    first, end = document.first_token, document.end_token
    parts, differences = parts_between(data, "train", first, end + 1)
    assert [part.document.record for part in parts] == [1, 2]
    assert (parts[0].first_token, parts[0].end_token, parts[1].end_token) == (first, end, end + 1)
    assert (parts[0].document.source, parts[0].document.columns["url"]) == ("x/x.jsonl", "https://example.org/1")
    assert len(differences) == len(said) and all(a in b for a, b in zip(said, differences, strict=True))
    capsys.readouterr()
    run_here("inspect", data, "--tokens", f"{first}-{end}")
    printed = capsys.readouterr().out
    assert f"x/x.jsonl, record 1, {shown}\n" in printed and "record 2" not in printed
    assert all(sentence in printed for sentence in differences)


def test_a_range_that_is_none_is_refused(small_tokenizer, tmp_path, capsys, fails):
    data = prepare(tmp_path, small_tokenizer, ["one two three"])
    num_tokens = Blocks(data, "train").num_tokens
    for text in ("5", "5-5", "9-3", "a-b", "-3"):
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(data), f"--tokens={text}"])
        assert ended.value.code == 2
    capsys.readouterr()
    message = fails("inspect", data, "--tokens", f"0-{num_tokens + 1}")
    assert f"--tokens is 0-{num_tokens + 1} but the blocks of train hold {num_tokens} tokens" in message


def differences(folder):
    return backend_differences(Tokenizer.from_file(str(folder / "tokenizer.json")), str(folder))


def test_all_that_differs_from_the_source_is_said(small_tokenizer, sentencepiece, tmp_path):
    def changed(**changes):
        return differences(with_changes(small_tokenizer, tmp_path / "changed", **changes))

    assert differences(small_tokenizer) == []
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    assert changed(pre_tokenizer=byte_level) == [
        "The tokenizer puts a space in front of a text that begins with none: ranges count one byte more than the "
        "source."
    ]
    split = {"type": "Split", "pattern": {"String": "-"}, "behavior": "Removed", "invert": False}
    pre_tokenizers = {"type": "Sequence", "pretokenizers": [split, {**byte_level, "add_prefix_space": False}]}
    assert changed(pre_tokenizer=pre_tokenizers) == ["The tokenizer leaves out what it splits text at (Split)."]
    model = json.loads((small_tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    few = {**model, "vocab": {"a": 4, "b": 5}, "merges": []}
    assert changed(model=few) == [
        "The tokenizer has no token for some bytes: they are left out, or unknown and count as 0."
    ]
    raw = json.loads((sentencepiece / "tokenizer.json").read_text(encoding="utf-8"))
    plain = {**raw["added_tokens"][0], "id": 300, "content": "<code>", "special": False}
    marked = with_changes(sentencepiece, tmp_path / "marked", added_tokens=[*raw["added_tokens"], plain])
    assert "in front of a text, and behind each added token," in differences(marked)[0]


def test_the_bytes_of_all_tokens_of_a_byte_level_bpe_hold_every_byte_once_alone(small_tokenizer, tmp_path):
    table = Vocabulary(prepare(tmp_path, small_tokenizer, ["some text"])).table
    assert table[:4] == [b""] * 4 and sorted(each for each in table if len(each) == 1) == [
        bytes([byte]) for byte in range(256)
    ]
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
    assert token_byte_lengths(tokenizer).tolist() == [len(each) for each in table]


def test_a_character_belongs_to_the_token_that_completes_it(small_tokenizer, tmp_path):
    vocabulary = Vocabulary(prepare(tmp_path, small_tokenizer, ["some text"]))
    one = {each: vocabulary.table.index(each) for each in [bytes([byte]) for byte in "é🙂a".encode()]}
    ids = [one[bytes([byte])] for byte in "é🙂a".encode()]
    assert vocabulary.texts(np.array(ids)) == ["", "é", "", "", "", "🙂", "a"]
    assert vocabulary.texts(np.array(ids[1:4])) == ["�", "", "�"]  # a block that begins and ends inside a character
    assert vocabulary.texts(np.array([0, ids[0], 1])) == ["[BOT]", "�", "[EOT]"]
    assert [vocabulary.show(token) for token in (1, ids[0], ids[-1])] == ["[EOT]", "b'\\xc3'", "'a'"]


def test_text_that_would_steer_a_terminal_is_shown_instead():
    assert show_unseen("a\tb\nc\r\x1b[31m\x7f\x9b\u202eé") == "a\tb\nc␍␛[31m␡<U+009B><U+202E>é"


def test_a_part_is_described_by_file_record_bytes_and_kept_columns(small_tokenizer, tmp_path):
    data = prepare(tmp_path, small_tokenizer, ["a river and a map " * 20, "letters " * 20])
    blocks, documents, lengths = Blocks(data, "train"), DocumentMap(data, "train"), Vocabulary(data).lengths
    last = blocks.num_tokens
    *_, part = find_parts(blocks, documents, lengths, last - 8, last)
    assert describe_part(part).startswith(f"x/x.jsonl, record 1, bytes {part.first_byte}-{part.end_byte} of 160")
    assert describe_part(part).endswith(", url https://example.org/1")
    assert count_bytes(blocks, lengths, 0, last) == sum(
        part.end_byte - part.first_byte for part in find_parts(blocks, documents, lengths, 0, last)
    )
