"""What a tokenizer is trained on: parts of all files, within the budget, never what is held out."""

import gzip
import json
import random
from pathlib import Path

import pytest
from conftest import run_here, write_jsonl

from data_prep.encode import text_hash
from data_prep.jobs import make_stream
from data_prep.plan import Options, make_plan
from data_prep.progress import Progress
from data_prep.tokenizer_sample import iter_sample

HALF = 2**63


def sample(sources: list[Path | str], num_bytes: int, threshold: int = 0, **options) -> list[str]:
    plan = make_plan(Options(tuple(map(str, sources)), out="unused", tokenizer="train:300", block_size=1, **options))
    files = [(number, file) for number in range(len(plan.sources)) for file in plan.local_files[number]]
    return list(iter_sample(make_stream(plan, files), threshold, num_bytes, Progress("reading", None)))


def write_files(folder: Path, num_files: int, num_documents: int) -> Path:
    """Documents of 100 bytes, `file document ...`."""
    folder.mkdir()
    for file in range(num_files):
        write_jsonl(folder / f"{file:03d}.jsonl", [f"{file} {n} ".ljust(100, "x") for n in range(num_documents)])
    return folder


def test_a_budget_is_spent_on_files_from_everywhere(tmp_path):
    folder = write_files(tmp_path / "many", 200, 10)
    texts = sample([folder], 40_000)
    assert 40_000 <= sum(map(len, texts)) <= 1.2 * 40_000
    files = sorted({int(text.split()[0]) for text in texts})
    assert len(files) == 40 and files[0] < 20 and files[-1] >= 180 and files != list(range(40))
    assert sample([folder], 40_000) == texts
    assert set(sample([folder], 10_000)) < set(texts), "a larger budget adds to the sample, it does not draw another"


def test_files_that_are_one_unit_share_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.tokenizer_sample.UNIT_BYTES", 1000)  # so that files of 9 kB are large ones
    for name in "abc":
        rng = random.Random(name)
        rows = [json.dumps({"text": name + rng.randbytes(50).hex()[:99]}) for _ in range(100)]
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    texts = sample([str(tmp_path / "*.gz")], 9_000)
    assert sorted(text[0] for text in texts) == ["a"] * 30 + ["b"] * 30 + ["c"] * 30


def test_sources_share_the_budget_by_size_and_caps_are_kept(tmp_path):
    small, large = write_files(tmp_path / "s", 5, 100), write_files(tmp_path / "l", 15, 100)
    texts = sample([small, large], 20_000)
    assert len(texts) == 200 and all(int(text.split()[0]) < 5 for text in texts[:50])
    assert len(set(texts[:50])) == 50 and len(set(texts[50:])) == 150
    capped = sample([f"{small}:7", large], 10**9)
    assert capped[:7] == [f"0 {n} ".ljust(100, "x") for n in range(7)] and len(capped) == 7 + 1500
    assert len(sample([small, large], 10**9, max_docs=42)) == 42


def test_what_is_held_out_is_never_in_the_sample(tmp_path):
    folder = write_files(tmp_path / "x", 4, 50)
    texts = sample([folder], 10**9, threshold=HALF)
    assert 60 < len(texts) < 140 and all(text_hash(text.encode()) >= HALF for text in texts)


@pytest.mark.parametrize("vocabulary", [300, 400])
def test_the_order_of_the_documents_does_not_change_the_tokenizer(tmp_path, vocabulary):
    texts = [path.read_text(encoding="utf-8")[:3000] for path in sorted(Path(__file__).parent.glob("*.py"))]
    for name in ("a", "b"):
        source = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        run_here("train-tokenizer", source, "--vocab-size", vocabulary, "--out", tmp_path / name)
        random.Random(0).shuffle(texts)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
