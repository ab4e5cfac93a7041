"""Caps take the shortest prefix in source order; what lies beyond is counted."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import content_of, read_documents, run_here, write_jsonl

from data_prep.manifest import load_manifest


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Five files of ten documents, 20 tokens each with BOS and EOS (18 letters that never merge)."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for file in range(5):
        write_jsonl(
            folder / f"{file}.jsonl", ["qxzjqxzjqxzjqxzjqx"[:17] + "0123456789"[number] for number in range(10)]
        )
    return folder


def prep(source: object, tokenizer: Path, out: Path, *more: object) -> dict:
    run_here("prep", source, "--tokenizer", tokenizer, "--block-size", 1, "--val-fraction", 0, "--out", out, *more)
    return load_manifest(out).ledger["corpus"]["documents"]


def test_max_tokens_takes_the_document_that_crosses_the_cap_whole(tmp_path, corpus, small_tokenizer):
    for cap, num_documents in ((1, 1), (20, 1), (21, 2), (200, 10), (201, 11), (10**6, 50)):
        out = tmp_path / f"out{cap}"
        documents = prep(corpus, small_tokenizer, out, "--max-tokens", cap)
        assert load_manifest(out).splits["train"].num_tokens == 20 * num_documents
        assert (documents["read"], documents["train"]) == (num_documents, num_documents)


def test_max_docs_and_a_cap_after_the_name_are_the_same_prefix(tmp_path, corpus, small_tokenizer):
    whole = prep(corpus, small_tokenizer, tmp_path / "whole")
    first = prep(corpus, small_tokenizer, tmp_path / "a", "--max-docs", 23)
    second = prep(f"{corpus}:23", small_tokenizer, tmp_path / "b")
    assert whole["train"] == 50 and whole["beyond_cap"] == 0 and whole["is_beyond_cap_exact"]
    assert first == second and first["train"] == 23
    assert (
        first["beyond_cap"] == 7 and not first["is_beyond_cap_exact"]
    )  # lines of files that were not read are not counted
    assert read_documents(tmp_path / "a", "train") == read_documents(tmp_path / "whole", "train")[:23]


def test_what_lies_beyond_is_counted_exactly_for_parquet(tmp_path, small_tokenizer):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for file in range(3):
        pq.write_table(pa.table({"text": ["some words"] * 10}), folder / f"{file}.parquet")
    documents = prep(f"{folder}:15", small_tokenizer, tmp_path / "out")
    assert (documents["train"], documents["beyond_cap"], documents["is_beyond_cap_exact"]) == (15, 15, True)


def test_a_cap_gives_the_same_bytes_with_two_workers(tmp_path, corpus, small_tokenizer, run_cli):
    fixed = ["--tokenizer", small_tokenizer, "--block-size", 1, "--val-fraction", 0.2, "--max-tokens", 450]
    for num_proc in (1, 2):
        out = tmp_path / str(num_proc) / "out"
        result = run_cli(["-m", "data_prep", "prep", corpus, *fixed, "--out", out, "--num-proc", num_proc])
        assert result.code == 0, result.stderr
    assert content_of(tmp_path / "1" / "out") == content_of(tmp_path / "2" / "out")
    splits = load_manifest(tmp_path / "1" / "out").splits
    assert splits["train"].num_tokens + splits["validation"].num_tokens == 460


def test_a_cap_on_one_source_leaves_the_next_whole(tmp_path, corpus, small_tokenizer):
    other = write_jsonl(tmp_path / "other.jsonl", ["another document"] * 4)
    out = tmp_path / "out"
    options = ("--tokenizer", small_tokenizer, "--block-size", 1, "--val-fraction", 0, "--out", out)
    run_here("prep", f"{corpus}:12", other, *options)
    ledger = load_manifest(out).ledger
    assert [ledger[name]["documents"]["train"] for name in ("corpus", "other")] == [12, 4]
    assert read_documents(out, "train")[-4:] == ["another document"] * 4


def test_bad_records_beyond_the_cap_are_no_reason_to_stop(tmp_path, small_tokenizer):
    source = tmp_path / "corpus.jsonl"
    source.write_text(json.dumps({"text": "good"}) + "\nno JSON\n")
    documents = prep(f"{source}:1", small_tokenizer, tmp_path / "a")
    assert documents["train"] == 1 and documents["bad"] == 0
    assert prep(source, small_tokenizer, tmp_path / "b", "--max-tokens", 2)["train"] == 1


def test_validation_is_a_share_of_documents_and_never_moves_to_train(tmp_path, small_tokenizer):
    texts = [f"document number {number}" for number in range(2000)]
    source = write_jsonl(tmp_path / "corpus.jsonl", [*texts, *texts[:200]])
    options = ("--tokenizer", small_tokenizer, "--block-size", 1, "--val-fraction", 0.1)
    run_here("prep", source, *options, "--out", tmp_path / "whole")
    run_here("prep", f"{source}:1000", *options, "--out", tmp_path / "part")
    validation = {name: set(read_documents(tmp_path / name, "validation")) for name in ("whole", "part")}
    train = {name: set(read_documents(tmp_path / name, "train")) for name in ("whole", "part")}
    assert 140 < len(validation["whole"]) < 260
    assert not validation["whole"] & train["whole"]  # 200 documents stand there twice: both lie on the same side
    assert validation["part"] == validation["whole"] & set(texts[:1000])


def test_validation_is_capped_in_tokens_for_large_corpora(tmp_path, small_tokenizer):
    source = write_jsonl(tmp_path / "corpus.jsonl", [f"document number {number} of many" for number in range(3000)])
    out = tmp_path / "out"
    options = ("--tokenizer", small_tokenizer, "--block-size", 1, "--val-fraction", 0.5, "--val-max-tokens", 1000)
    run_here("prep", source, *options, "--out", out)
    manifest = load_manifest(out)
    assert manifest.validation["fraction"] == 1000 / manifest.validation["estimated_tokens"] < 0.5
    assert (
        0 < manifest.splits["validation"].num_tokens < 6000
    )  # the estimate is four bytes a token; this tokenizer has fewer
