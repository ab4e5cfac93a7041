"""Sources that are tokenized already: the same blocks as from their text, and ids that cannot be theirs are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import content_of, read_documents, run_here, write_jsonl
from tokenizers import Tokenizer

from data_prep.documents import DocumentMap
from data_prep.manifest import load_manifest

TEXTS = [f"document {number}: naïve letters to 東京 " * (number % 7 + 1) for number in range(90)]
SLOW = pytest.mark.slow
FIXED = ("--block-size", 16, "--val-fraction", 0.1)


@pytest.fixture
def ids(small_tokenizer) -> list[list[int]]:
    """The texts' ids, without separators."""
    tokenizer = Tokenizer.from_file(str(small_tokenizer / "tokenizer.json"))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


@pytest.fixture
def from_text(tmp_path, small_tokenizer) -> Path:
    """The dataset that the texts themselves give."""
    source = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    run_here("prep", source, "--tokenizer", small_tokenizer, *FIXED, "--out", tmp_path / "from_text")
    return tmp_path / "from_text"


def shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content_of(folder).items() if name.endswith(".arrow") and "data-" in name}


def arrow(path: Path, rows: list[list[int]]) -> Path:
    table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


@pytest.mark.parametrize("form", ["bos and eos", *(pytest.param(each, marks=SLOW) for each in ("nothing", "eos"))])
def test_rows_that_are_documents_give_the_blocks_of_their_text(tmp_path, small_tokenizer, ids, from_text, form):
    rows = [[*([0] if "bos" in form else []), *each, *([1] if "eos" in form else [])] for each in ids]
    urls = [f"u{number}" for number in range(len(rows))]
    pq.write_table(pa.table({"input_ids": rows, "url": urls}), tmp_path / "ids.parquet", row_group_size=20)
    out = tmp_path / "out"
    command = ("--tokenizer", small_tokenizer, *FIXED, "--out", out, "--tokenized", "documents")
    run_here("prep", tmp_path / "ids.parquet", *command)
    assert shards(out) == shards(from_text)
    assert read_documents(out, "train") == read_documents(from_text, "train")
    assert DocumentMap(out, "train").document(3).columns["url"].startswith("u")
    manifest, expected = load_manifest(out), load_manifest(from_text)
    assert manifest.splits["train"].num_bytes == expected.splits["train"].num_bytes
    assert manifest.encoder == {"name": "none", "why": "the source is tokenized already"}
    for command in ("check", "inspect", "stat"):
        run_here(command, out)


@pytest.mark.parametrize("num_proc", [1, pytest.param(2, marks=SLOW)])
def test_a_bin_is_cut_into_documents_at_eos(tmp_path, small_tokenizer, ids, from_text, num_proc, monkeypatch):
    monkeypatch.setattr("data_prep.units.UNIT_BYTES", 1001)  # borders inside of ids and of documents
    stream = [token for each in ids for token in [0, *each, 1]][:-1]  # the last has no EOS
    np.array(stream, dtype=np.uint16).tofile(tmp_path / "train.bin")
    out = tmp_path / "out"
    command = ("--tokenizer", small_tokenizer, *FIXED, "--out", out, "--tokenized", "stream", "--num-proc", num_proc)
    run_here("prep", tmp_path / "train.bin", *command)
    assert shards(out) == shards(from_text)
    assert [d.record for d in DocumentMap(out, "train").between(0, 10**9)] == [
        d.record for d in DocumentMap(from_text, "train").between(0, 10**9)
    ]
    run_here("check", out)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_rows_that_are_parts_of_a_stream_are_joined_over_rows_and_files(
    tmp_path, small_tokenizer, ids, from_text, suffix
):
    stream = [token for each in ids for token in [*each, 1]]
    rows = [stream[start : start + 50] for start in range(0, len(stream), 50)]
    (tmp_path / "ids").mkdir()
    for number, part in enumerate((rows[:20], rows[20:])):
        if suffix == "arrow":
            arrow(tmp_path / "ids" / f"{number}.arrow", part)
        else:
            pq.write_table(pa.table({"input_ids": part}), tmp_path / "ids" / f"{number}.parquet", row_group_size=3)
    out = tmp_path / "out"
    command = ("--tokenizer", small_tokenizer, *FIXED, "--out", out, "--tokenized", "stream")
    run_here("prep", tmp_path / "ids", *command)
    assert shards(out) == shards(from_text)
    run_here("check", out)


def test_a_vocabulary_over_65536_is_uint32_there_and_back(tmp_path, small_tokenizer):
    raw = json.loads((small_tokenizer / "tokenizer.json").read_text())
    for number in range(70_000):
        raw["model"]["vocab"][f"<unused{number}>"] = len(raw["model"]["vocab"])
    large = tmp_path / "large"
    large.mkdir()
    (large / "tokenizer.json").write_text(json.dumps(raw))
    (large / "tokenizer_config.json").write_text((small_tokenizer / "tokenizer_config.json").read_text())
    ids = np.array([0, 300, 70_001, 70_299, 1] * 20, dtype=np.uint32)
    ids.tofile(tmp_path / "train.bin")
    out = tmp_path / "out"
    fixed = ("--tokenizer", large, "--block-size", 10, "--val-fraction", 0, "--out", out, "--tokenized", "stream")
    run_here("prep", tmp_path / "train.bin", *fixed)
    manifest = load_manifest(out)
    assert (manifest.dtype, manifest.splits["train"].num_tokens) == ("uint32", 100)
    assert "<unused69999>" in read_documents(out, "train")[0]
    run_here("check", out)


def test_ids_that_cannot_be_the_tokenizers_are_refused(tmp_path, small_tokenizer, fails):
    out = tmp_path / "out"

    def message(name: str, *more: object, tokenizer: object = small_tokenizer) -> str:
        found = fails("prep", tmp_path / name, *FIXED, "--tokenizer", tokenizer, "--out", out, *more)
        assert not (out / "manifest.json").exists()
        shutil.rmtree(out, ignore_errors=True)
        return found

    np.array([5, 6, 1, 7, 300, 1], dtype=np.uint16).tofile(tmp_path / "a.bin")
    text = "x.bin: record 2: the document holds the id 300 but the vocabulary of --tokenizer has 300 entries"
    assert text.replace("x.bin", "a.bin") in message("a.bin", "--tokenized", "stream")
    np.array([5, 6, 1] * 20, dtype=np.uint32).tofile(tmp_path / "b.bin")
    assert "looks like uint32" in message("b.bin", "--tokenized", "stream")
    (tmp_path / "c.bin").write_bytes(b"123")
    assert "no whole number of uint16 ids" in message("c.bin", "--tokenized", "stream")
    assert "a .bin has no rows" in message("a.bin", "--tokenized", "documents")
    assert "--tokenized stream" in message("a.bin")
    assert "Give the one that made them" in message("a.bin", "--tokenized", "stream", tokenizer="train:300")
    pq.write_table(pa.table({"input_ids": [[5, -1]]}), tmp_path / "d.parquet")
    assert "holds the id -1" in message("d.parquet", "--tokenized", "documents")
    pq.write_table(pa.table({"input_ids": ["text"]}), tmp_path / "e.parquet")
    assert "holds string, not lists of ids" in message("e.parquet", "--tokenized", "documents")
    pq.write_table(pa.table({"input_ids": [[0, 5, 0, 6]]}), tmp_path / "f.parquet")
    assert "BOS in its middle" in message("f.parquet", "--tokenized", "documents")


def test_bad_rows_of_ids_are_skipped_and_counted_when_asked(tmp_path, small_tokenizer):
    rows = [[5, 6, 7, 1], None, [5, 999], [], [1], [8, 1, 9, 1]]
    pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int64()))}), tmp_path / "ids.parquet")
    out = tmp_path / "out"
    fixed = ("--tokenizer", small_tokenizer, "--block-size", 1, "--val-fraction", 0, "--out", out)
    run_here("prep", tmp_path / "ids.parquet", *fixed, "--tokenized", "documents", "--on-bad-record", "skip")
    documents = load_manifest(out).ledger["ids"]["documents"]
    assert (documents["read"], documents["bad"], documents["empty"], documents["train"]) == (7, 2, 2, 3)
    run_here("check", out)
