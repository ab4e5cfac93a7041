"""No text is lost: blocks decode back to the documents, byte for byte, whatever they hold."""

import gzip
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import read_documents, run_here, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.blocks import NO_TARGET, Blocks
from data_prep.documents import DocumentMap, documents_between
from data_prep.encode import text_hash
from data_prep.manifest import load_manifest

CONTROL_SPELLINGS = ("[BOT]", "[EOT]", "[PAD]", "[UNK]", "<|endoftext|>", "</s>")
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.sampled_from([*CONTROL_SPELLINGS, " ", "\n", "word", "\r\n", "\0"]), max_size=12).map("".join),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, max_size=25), block_size=st.integers(1, 40), fraction=st.sampled_from([0, 0.4]))
def test_blocks_decode_back_to_the_documents(small_tokenizer, texts, block_size, fraction):
    texts = [*texts, "so that there is one block to train on, whatever was drawn"]
    with tempfile.TemporaryDirectory() as folder:
        source, out = write_jsonl(Path(folder) / "x.jsonl", texts), Path(folder) / "out"
        options = ("--tokenizer", small_tokenizer, "--block-size", block_size, "--val-fraction", fraction, "--out", out)
        run_here("prep", source, *options, "--num-proc", 1)
        run_here("check", out)
        manifest = load_manifest(out)
        threshold = manifest.validation["threshold"]
        for split in ("train", "validation"):
            expected = [t for t in texts if t and (text_hash(t.encode()) < threshold) == (split == "validation")]
            info, found = manifest.splits[split], read_documents(out, split)
            assert found == expected[: len(found)]
            assert info.num_documents == len(expected)
            assert info.num_bytes == sum(len(text.encode()) for text in expected)
            # What is not found lies, whole or in part, in the one remainder, which is shorter than a block.
            assert info.remainder_tokens < block_size
            assert info.num_blocks * block_size + info.remainder_tokens == info.num_tokens
            missing = expected[len(found) :]
            assert (len(missing) == 0) or info.remainder_tokens > 0
        assert manifest.ledger["x"]["documents"]["empty"] == sum(text == "" for text in texts)


def test_every_format_gives_the_same_documents(tmp_path, small_tokenizer):
    texts = [f"Document {number}: naïve 東京 🙂\r\n\t[EOT] {'x' * number}" for number in range(20)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    folder = tmp_path / "files"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:02d}{'.md' if number % 2 else '.txt'}").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[:300]) + gzip.compress(lines[300:]))
    with pa.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as stream:
        stream.write(lines)
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet", row_group_size=3)
    fingerprints = set()
    for source in ("files", "files/*", "a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        out = tmp_path / "out" / source.replace("/*", "-glob")
        run_here("prep", tmp_path / source, "--tokenizer", small_tokenizer, "--block-size", 8, "--out", out)
        found = read_documents(out, "train")
        assert found == texts[: len(found)] and len(found) >= 19
        fingerprints.add(load_manifest(out).fingerprint)
    assert len(fingerprints) == 1


def test_the_token_after_a_block_is_read_within_a_shard(tmp_path, small_tokenizer, monkeypatch):
    monkeypatch.setattr("data_prep.align.SHARD_TOKENS", 32)
    source = write_jsonl(tmp_path / "x.jsonl", ["some words " * 20] * 3)
    run_here(
        "prep",
        source,
        "--tokenizer",
        small_tokenizer,
        "--block-size",
        8,
        "--val-fraction",
        0,
        "--out",
        tmp_path / "out",
    )
    blocks = Blocks(tmp_path / "out", "train")
    assert len(blocks.shard_starts) > 3 and blocks.shard_starts[1] == 4
    read = blocks.read(range(blocks.num_blocks))
    stream = read[:, :-1].reshape(-1)
    for number in range(blocks.num_blocks):
        is_last = number + 1 in blocks.shard_starts
        assert read[number, -1] == (NO_TARGET if is_last else stream[(number + 1) * 8])
    assert (blocks.token_at(range(blocks.num_tokens)) == stream).all()
    shards, rows = blocks.locate([0, 4, 5])
    assert shards.tolist() == [0, 1, 1] and rows.tolist() == [0, 0, 1]


def test_datasets_loads_each_split_also_an_empty_one(tmp_path, small_tokenizer, monkeypatch):
    from datasets import load_from_disk

    monkeypatch.setattr("data_prep.align.SHARD_TOKENS", 32)
    source = write_jsonl(tmp_path / "x.jsonl", ["some words " * 20])
    run_here(
        "prep",
        source,
        "--tokenizer",
        small_tokenizer,
        "--block-size",
        8,
        "--val-fraction",
        0,
        "--out",
        tmp_path / "out",
    )
    train = load_from_disk(str(tmp_path / "out" / "train"))
    blocks = Blocks(tmp_path / "out", "train")
    assert train.num_rows == blocks.num_blocks > 5
    assert train[5]["input_ids"] == blocks.read([5])[0, :-1].tolist()
    assert load_from_disk(str(tmp_path / "out" / "validation")).num_rows == 0
    assert Blocks(tmp_path / "out", "validation").num_blocks == 0


def test_the_document_map_leads_back_to_file_record_and_columns(tmp_path, small_tokenizer):
    columns = {"url": ["u0", "u1", "u2"], "score": [0.5, "high", 3], "language": ["en", None, "fr"]}
    write_jsonl(tmp_path / "a.jsonl", ["first " * 9, "second " * 9, "third " * 9], **columns)
    (tmp_path / "b.txt").write_text("fourth " * 9)
    options = ("--tokenizer", small_tokenizer, "--block-size", 4, "--val-fraction", 0, "--out", tmp_path / "out")
    run_here("prep", tmp_path / "a.jsonl", tmp_path / "b.txt", *options)
    documents = DocumentMap(tmp_path / "out", "train")
    found = [documents.document(number) for number in range(len(documents))]
    assert [(document.source, document.record) for document in found] == [
        ("a/a.jsonl", 0),
        ("a/a.jsonl", 1),
        ("a/a.jsonl", 2),
        ("b/b.txt", 0),
    ]
    assert [document.num_bytes for document in found] == [54, 63, 54, 63]
    assert found[1].columns == {"url": "u1", "score": None, "language": None}
    assert found[2].columns == {"url": "u2", "score": 3.0, "language": "fr"}
    border = found[1].end_token
    assert [document.number for document in documents_between(tmp_path / "out", "train", border - 1, border + 1)] == [
        1,
        2,
    ]
    assert documents_between(tmp_path / "out", "train", border, border) == []


def test_lines_are_documents_only_when_asked(tmp_path, small_tokenizer):
    (tmp_path / "poem.txt").write_bytes(b"first line of it\r\n\nthird line of it\nno end of line at the end")
    options = ("--tokenizer", small_tokenizer, "--block-size", 1, "--val-fraction", 0)
    run_here("prep", tmp_path / "poem.txt", *options, "--out", tmp_path / "file")
    run_here("prep", tmp_path / "poem.txt", *options, "--split-lines", "--out", tmp_path / "lines")
    assert read_documents(tmp_path / "file", "train") == [(tmp_path / "poem.txt").read_bytes().decode()]
    assert read_documents(tmp_path / "lines", "train") == [
        "first line of it",
        "third line of it",
        "no end of line at the end",
    ]
    records = [document.record for document in documents_between(tmp_path / "lines", "train", 0, 10**6)]
    assert records == [0, 2, 3]


def test_a_catalogue_file_may_make_every_line_a_document(tmp_path, small_tokenizer, monkeypatch):
    (tmp_path / "lines.txt").write_text("first\nsecond\n")
    monkeypatch.setattr("data_prep.catalog.FOLDER", tmp_path)
    (tmp_path / "poems.yaml").write_text(
        f"description: poems\npath: {tmp_path}/lines.txt\nlicence: CC0-1.0\nsource_of_numbers: none\nsplit: line\n"
        f"default_tokenizer: {small_tokenizer}\ndefault_block_size: 1\nval_fraction: 0.0\n"
    )
    run_here("prep", "poems", "--out", tmp_path / "out")
    assert read_documents(tmp_path / "out", "train") == ["first", "second"]


def test_byte_ranges_of_a_file_give_each_line_once(tmp_path, small_tokenizer, monkeypatch):
    texts = [f"line {number} " + "x" * (number * 7 % 50) for number in range(200)]
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    source.write_text(
        source.read_text().replace('{"text": "line 50 ', '\n{"text": "line 50 ')
    )  # a blank line counts as a line
    for size in (64, 1000, 8_000_000):
        monkeypatch.setattr("data_prep.units.UNIT_BYTES", size)
        out = tmp_path / f"out{size}"
        run_here("prep", source, "--tokenizer", small_tokenizer, "--block-size", 1, "--val-fraction", 0, "--out", out)
        assert read_documents(out, "train") == texts
        records = [document.record for document in documents_between(out, "train", 0, 10**9)]
        assert records == [*range(50), *range(51, 201)]
