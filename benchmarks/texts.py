"""Real text for benchmarks, from this machine: source code and documentation of its Python and its packages."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".c", ".cpp", ".js", ".html", ".pl", ".pm"}
NUM_FILES = 2


def write_texts(folder: Path, num_bytes: int) -> dict[str, str]:
    """The same documents as JSON lines and as Parquet (zstd), about so many bytes of text; a glob for each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(exist_ok=True)
    texts, left = [], num_bytes
    for text in iter_documents():
        if left <= 0:
            break
        left -= len(text.encode())
        texts.append(text)
    if left > 0:
        sys.exit(f"error: this machine has only {(num_bytes - left) / 1e6:.0f} MB of text; give a smaller --megabytes.")
    share = -(-len(texts) // NUM_FILES)
    for number in range(NUM_FILES):
        part = texts[number * share : (number + 1) * share]
        with open(folder / f"text-{number}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
        path = folder / f"text-{number}.parquet"
        pq.write_table(pa.table({"text": part}), path, compression="zstd", row_group_size=1000)
    return {"json": str(folder / "text-*.jsonl"), "parquet": str(folder / "text-*.parquet")}


def write_repeated(path: Path, num_bytes: int) -> None:
    """JSON lines of so many bytes of text: the same documents again and again, a number in front of each."""
    documents = []
    for text in iter_documents():
        documents.append(json.dumps(text, ensure_ascii=False)[1:].encode())
        if len(documents) == 10_000:
            break
    written = number = 0
    with open(path, "wb", buffering=2**20) as file:
        while written < num_bytes:
            written += file.write(b'{"text": "%d %s}\n' % (number, documents[number % len(documents)]))
            number += 1


def iter_documents() -> Iterator[str]:
    """Text files of this machine, none twice, in a fixed order, at most 200 kB of each."""
    seen = set()
    for root in (
        sysconfig.get_paths()["purelib"],
        sysconfig.get_paths()["stdlib"],
        "/usr/share",
        "/usr/include",
        "/usr/lib",
    ):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix not in SUFFIXES or path.is_symlink() or not path.is_file():
                continue
            try:
                text = path.read_text(encoding="utf-8")[:200_000]
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if text and digest not in seen:
                seen.add(digest)
                yield text
