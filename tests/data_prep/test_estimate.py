"""`prep --estimate` says about what prep then makes, and writes nothing."""

import gzip
import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import content_of, run_here

from data_prep.__main__ import main
from data_prep.manifest import load_manifest


def write_files(folder: Path, kind: str) -> None:
    rng = random.Random(5)
    words = ["the", "river", "carries", "letters", "and", "a", "map", "of", "the", "old", "town", "東京", "naïve"]
    folder.mkdir()
    for part in range(12):
        texts = [" ".join(rng.choices(words, k=rng.randint(5, 200))) for _ in range(150)]
        if kind == "parquet":
            pq.write_table(pa.table({"text": texts}), folder / f"{part}.parquet", row_group_size=50)
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
            (folder / f"{part}.{kind}").write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("jsonl", "here"),
        ("parquet", "address"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("parquet", "here"), ("jsonl.gz", "here"), ("jsonl", "address"), ("jsonl.gz", "address"))
        ),
    ],
)
def test_the_estimate_is_near_what_prep_makes(tmp_path, small_tokenizer, capsys, kind, where, monkeypatch):
    monkeypatch.setattr("data_prep.estimate.SAMPLE_BYTES", 20_000)
    folder = tmp_path / "corpus"
    write_files(folder, kind)
    source = folder if where == "here" else f"file://{folder}"
    fixed = ("--tokenizer", small_tokenizer, "--block-size", 16, "--out", tmp_path / "out")
    before = content_of(tmp_path)
    assert main([str(each) for each in ("prep", source, *fixed, "--estimate")]) == 0
    shown = capsys.readouterr().out
    assert content_of(tmp_path) == before and not (tmp_path / "out").exists()
    run_here("prep", folder, *fixed)
    documents = load_manifest(tmp_path / "out").ledger["corpus"]["documents"]["read"]
    tokens = sum(split.num_tokens for split in load_manifest(tmp_path / "out").splits.values())
    cells = re.split(r"\s{2,}", shown.splitlines()[1])
    assert 0.8 < to_number(cells[3]) / documents < 1.25
    assert 0.8 < to_number(cells[5]) / tokens < 1.25
    assert "disk: " in shown and "time: about " in shown and "Nothing was written." in shown


def test_caps_and_a_tokenizer_that_is_not_trained_yet_are_said(tmp_path, capsys):
    write_files(tmp_path / "corpus", "jsonl")
    assert main(["prep", f"{tmp_path}/corpus:90", "--tokenizer", "train:400", "--estimate"]) == 0
    shown = capsys.readouterr().out
    assert 85 <= to_number(re.split(r"\s{2,}", shown.splitlines()[1])[3]) <= 90
    assert "Tokens are a guess: 4 bytes each" in shown


def to_number(text: str) -> float:
    value, _, unit = text.partition(" ")
    return float(value) * {"": 1, "k": 1e3, "M": 1e6}[unit]
