"""No text is lost and no byte differs: random corpora, block sizes, packings, workers, encoders and kills."""

import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import content_of, read_documents, run_here

from data_prep.encode import text_hash
from data_prep.manifest import load_manifest
from data_prep.packing import PACKINGS

ROOT = Path(__file__).parents[2]
SPELLINGS = ("[BOT]", "[EOT]", "[PAD]", "[UNK]", "<|endoftext|>", "</s>", "\ufeff", "\u180e", "\u200d", "\r\n", "\x85")
SEED = int(os.environ["KILL_SEED"])  # tests/conftest.py draws one and shows it


def draw_text(rng: random.Random) -> str:
    """A document of one kind or another."""
    kind = rng.randrange(7)
    if kind == 0:
        return ""
    if kind == 1:  # all planes of Unicode but the surrogates, which no UTF-8 file can hold
        return "".join(chr(rng.choice((rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(300))
    if kind == 2:
        return "".join(rng.choice(SPELLINGS) for _ in range(rng.randrange(1, 12)))
    if kind == 3:
        return rng.choice((" ", "\n", "\t", "a", "東")) * rng.randrange(1, 5000)
    if kind == 4:
        return "".join(chr(rng.randrange(1, 0x250)) for _ in range(rng.randrange(1, 4000)))
    return " ".join(
        rng.choice(("river", "map", "naïve", "東京", "1,024", "don't", "🙂")) for _ in range(rng.randrange(400))
    )


def write_corpus(folder: Path, rng: random.Random) -> list[str]:
    """Files of all formats in reading order, more than one unit of them; the documents."""
    folder.mkdir()
    texts = [draw_text(rng) for _ in range(250)]
    texts[rng.randrange(250)] = "".join(rng.choice(("a word ", "x", "\n", "東")) for _ in range(4_000_000))  # 10 MB
    texts[rng.randrange(250)] = "the longest word " * 300_000
    start = 0
    for number in range(5):
        end = 250 if number == 4 else rng.randrange(start, start + 80)
        part, start = texts[start:end], end
        kind = rng.choice(("jsonl", "jsonl.gz", "parquet"))
        path = folder / f"{number}.{kind}"
        lines = "".join(json.dumps({"text": text}, ensure_ascii=rng.random() < 0.5) + "\n" for text in part).encode()
        if kind == "parquet":
            pq.write_table(pa.table({"text": pa.array(part, pa.string())}), path, row_group_size=rng.randrange(1, 90))
        elif part:
            path.write_bytes(lines if kind == "jsonl" else gzip.compress(lines, 1))
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("case", range(3))
def test_any_corpus_survives_kills_and_comes_back_whole(tmp_path, small_tokenizer, case):
    rng = random.Random(f"{SEED} {case}")
    texts = write_corpus(tmp_path / "corpus", rng)
    fixed = ["--tokenizer", small_tokenizer, "--block-size", rng.choice((1, 7, 64, 2048)), "--val-fraction", 0.1]
    fixed += ["--packing", rng.choice(PACKINGS)]
    reference, out = tmp_path / "a" / "out", tmp_path / "b" / "out"
    started_at = time.monotonic()
    run_here("prep", tmp_path / "corpus", *fixed, "--out", reference, "--num-proc", 1, "--encoder", "hf")
    seconds = time.monotonic() - started_at

    num_kills = rng.randrange(1, 4)
    for attempt in range(num_kills + 1):
        options = ["--out", out, "--num-proc", rng.randrange(1, 5)]  # another number of workers each time
        command = [sys.executable, "-m", "data_prep", "prep", tmp_path / "corpus", *fixed, *options]
        process = subprocess.Popen(
            [str(word) for word in command],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if attempt < num_kills:
            time.sleep(rng.uniform(0.2, 0.2 + seconds))
            process.kill()
        _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, f"KILL_SEED={SEED}: {stderr}"

    assert run_here("check", out) is None
    found, expected = content_of(out), content_of(reference)
    manifest = load_manifest(out)
    assert manifest.ledger == load_manifest(reference).ledger
    found.pop("manifest.json"), expected.pop("manifest.json")  # which name their encoders
    assert found == expected, f"KILL_SEED={SEED}"
    threshold = manifest.validation["threshold"]
    for split in ("train", "validation"):
        of_split = [t for t in texts if t and (text_hash(t.encode()) < threshold) == (split == "validation")]
        decoded = read_documents(out, split)  # all but what lies, whole or in part, in the one remainder
        assert decoded == of_split[: len(decoded)], f"KILL_SEED={SEED}"
        assert manifest.splits[split].num_documents == len(of_split)
        assert manifest.splits[split].num_bytes == sum(len(text.encode()) for text in of_split)
    counts = manifest.ledger["corpus"]["documents"]
    assert counts["empty"] == sum(text == "" for text in texts) and counts["read"] == len(texts)
