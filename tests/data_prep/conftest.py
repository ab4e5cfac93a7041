"""For the tests of data_prep: a small tokenizer, and a way to run its commands in this process or in one of its own."""

import fcntl
import json
import os
import pty
import random
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from data_prep.__main__ import main
from data_prep.blocks import Blocks
from data_prep.documents import DocumentMap
from data_prep.tokenizer_folder import load_backend
from data_prep.tokenizer_training import ControlTokens, train_tokenizer

WORDS = "the river carries letters and a map of the old town; naïve plans, 東京, 1,024 steps\n\tagain and again 🙂 "
ROOT = Path(__file__).resolve().parents[2]
SCORES = (None, 0, 1.5, 2.999, 3, 3.5, 5, 5.001, 9)


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A byte-level BPE of 300 entries with [BOT] [EOT] [PAD] [UNK] as ids 0 to 3."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "small_tokenizer"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            train_tokenizer([WORDS * 20], 300, folder, ControlTokens())
    return folder


@pytest.fixture
def fails(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """`fails("prep", path, ...)`: the command ends with exit code 2 and one message, no traceback; the message."""

    def run(*arguments: object) -> str:
        code = main([str(argument) for argument in arguments])
        message = capsys.readouterr().err
        assert code == 2, message
        assert "Traceback" not in message
        assert message.count("error: ") == 1
        return message[message.index("error: ") :]

    return run


def run_here(*arguments: object) -> None:
    """Run a command in this process; it must succeed."""
    assert main([str(argument) for argument in arguments]) == 0


def run_on_terminal(*arguments: object) -> str:
    """Run `python -m data_prep ...` on a terminal of 120 columns; all that it writes. It must succeed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    with suppress(OSError):  # EIO: nobody writes to the terminal any more
        while new := os.read(ours, 2**16):
            written += new
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


def write_jsonl(path: Path, texts: Iterable[str], **columns: list) -> Path:
    """A JSON lines file of documents."""
    rows = [{"text": text, **{name: values[i] for name, values in columns.items()}} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_scored_rows(num: int = 400) -> list[dict]:
    """Records with every kind of score; a fifth of the texts stand there again, with another score."""
    rng = random.Random(11)
    words = ["the", "river", "carries", "letters", "and", "a", "map", "東京", "naïve"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 20))) for _ in range(num)]
    texts[num // 5 * 4 :] = texts[: num - num // 5 * 4]
    texts[7] = ""
    return [{"text": text, "url": f"u{i}", "score": rng.choice(SCORES)} for i, text in enumerate(texts)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """A JSON lines or Parquet file of records, as its name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_documents(folder: Path, split: str) -> list[str]:
    """The documents of a split as text, out of its blocks; without those in the remainder."""
    blocks, documents, backend = Blocks(folder, split), DocumentMap(folder, split), load_backend(folder / "tokenizer")
    texts = []
    for document in documents.between(0, documents.num_tokens):
        ranges = documents.ranges(document.first_token, document.end_token)
        if sum(end - first for first, end in ranges) < document.end_token - document.first_token:
            break
        tokens = np.concatenate([blocks.token_at(np.arange(first, end)) for first, end in ranges])
        assert (tokens[0], tokens[-1]) == (0, 1)  # [BOT] ... [EOT]
        texts.append(backend.decode(tokens[1:-1].tolist(), skip_special_tokens=False))
    return texts


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
