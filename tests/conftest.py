"""What all tests share: an offline environment, one small corpus, one prepared dataset, and a way to run our commands.

Tests run on the CPU and without a network. `-m gpu` is the exception: it sees the GPUs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent

# Before anything imports torch or huggingface_hub, which read these once. Subprocesses inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    MPLBACKEND="Agg",
)
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores
    os.environ.update(OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1")
# The user's data and runs are no business of the tests; nor is the `make` that may have started them.
for name in ("DATA_DIR", "RUNS_DIR", "WANDB_API_KEY", "HF_TOKEN", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(name, None)

SUBJECTS = (
    "The river",
    "A small engine",
    "Every reader",
    "The old library",
    "Some winter morning",
    "Élise",
    "The clerk",
)
VERBS = ("carries", "forgets", "repeats", "measures", "opens", "follows", "explains", "counts")
OBJECTS = ("the letters", "a long table", "seven stones", "its own name", "the naïve plan", "a map of 東京", "nothing")
ENDINGS = (
    "before noon",
    "without a sound",
    "as always",
    "in the rain",
    "for 1,024 steps",
    "again and again 🙂",
    "at last",
)


class Result(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


class Prepared(NamedTuple):
    """A prepared dataset: 384 tokens of vocabulary, block size 64, a validation split of about a tenth."""

    folder: Path
    tokenizer: Path
    corpus: Path


RunCli = Callable[..., Result]


def pytest_configure(config: pytest.Config) -> None:
    if "CLM_CACHE_DIR" not in os.environ:  # xdist's workers share the session's
        os.environ["CLM_CACHE_DIR"] = tempfile.mkdtemp(prefix="clm-cache-")
        config.add_cleanup(lambda folder=os.environ["CLM_CACHE_DIR"]: shutil.rmtree(folder, ignore_errors=True))
    os.environ.setdefault("KILL_SEED", str(time.time_ns() % 1_000_000))  # xdist's workers inherit it
    if config.option.markexpr.strip() != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_report_header() -> str:
    return f"KILL_SEED={os.environ['KILL_SEED']}: of the random moments of kills; set it to repeat them"


def run_command(
    arguments: Sequence[str | Path],
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 280,
    stdin: str | None = None,
) -> Result:
    """Run this interpreter with `arguments`, e.g. ["-m", "data_prep", "stat", folder]; `env` is added to ours."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        timeout=timeout_s,
        input=stdin if stdin is not None else "",
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def run_cli() -> RunCli:
    """`run_cli(["-m", "data_prep", ...], cwd=..., env={...}, timeout_s=...) -> Result(code, stdout, stderr)`."""
    return run_command


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with about 200 KB of text: 8 .txt files, and 300 records in a .jsonl with `text` and `url`."""
    folder = tmp_path_factory.mktemp("tiny_corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Prepared:
    """The tiny corpus, prepared once per test session by the real commands. Read only: copy it to change it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "prepared"  # all xdist workers see base.parent
    ready = Prepared(shared / "data" / "tiny", shared / "tokenizer", shared / "corpus")
    with FileLock(f"{shared}.lock"):
        if not (ready.folder / "manifest.json").exists():
            write_corpus(ready.corpus)
            train = ["train-tokenizer", ready.corpus, "--vocab-size", "384", "--out", ready.tokenizer]
            prep = ["prep", ready.corpus, "--tokenizer", ready.tokenizer, "--block-size", "64", "--out", ready.folder]
            for arguments in (train, [*prep, "--val-fraction", "0.1", "--num-proc", "1"]):
                result = run_command(["-m", "data_prep", *arguments])
                assert result.code == 0, f"{arguments[0]} failed:\n{result.stdout}\n{result.stderr}"
    return ready


@pytest.fixture(scope="session")
def second_dataset(prepared: Prepared) -> Path:
    """Another dataset of the same tokenizer and block size: the tiny corpus in another order. Read only."""
    folder = prepared.folder.with_name("second")
    with FileLock(f"{folder}.lock"):
        if not (folder / "manifest.json").exists():
            corpus = folder.with_name("second_corpus")
            corpus.mkdir(exist_ok=True)
            for number, path in enumerate(sorted(prepared.corpus.glob("*.txt"), reverse=True)):
                (corpus / f"{number}.txt").write_text(path.read_text(encoding="utf-8")[::2], encoding="utf-8")
            prep = ["prep", corpus, "--tokenizer", prepared.tokenizer, "--block-size", "64", "--out", folder]
            result = run_command(["-m", "data_prep", *prep, "--num-proc", "1"])
            assert result.code == 0, result.stderr
    return folder


def write_corpus(folder: Path) -> None:
    """Write the tiny corpus; the same bytes each time. One document holds texts that look like control tokens."""
    rng = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(8):
        (folder / f"chapter_{number}.txt").write_text(write_text(rng, 150), encoding="utf-8")
    with open(folder / "pages.jsonl", "w", encoding="utf-8") as file:
        for number in range(300):
            text = write_text(rng, rng.randint(1, 16))
            if number == 7:
                text += "It ends with [EOT] and <|endoftext|>, as [BOT] texts do.\n"
            record = {"text": text, "url": f"https://example.org/{number}"}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_text(rng: random.Random, num_sentences: int) -> str:
    """Sentences with some order in them, so that a small model can learn."""
    sentences = (
        " ".join(rng.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, ENDINGS)) for _ in range(num_sentences)
    )
    return ".\n".join(sentences) + ".\n"
