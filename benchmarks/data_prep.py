"""How fast is text turned into blocks, beside the way of transformers' run_clm.py? Whole commands, start-up included.

    python benchmarks/data_prep.py                    100 MB of text, prints JSON lines and a table
    python benchmarks/data_prep.py --megabytes 500

The text is what lies on this machine: source code and documentation of its Python and its packages, no file twice, as
JSON lines and as Parquet. In turns: ours (`python -m data_prep prep`), and run_clm.py's way (`datasets.map` with the
tokenizer, then `group_texts`), both on two processes with the same trained tokenizer. Tokens are those of the text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".c", ".cpp", ".js", ".html", ".pl", ".pm"}
BLOCK_SIZE = 2048
RUN_CLM = """
import sys
from itertools import chain
from datasets import load_dataset
from transformers import AutoTokenizer

kind, path, tokenizer, out, num_proc = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
raw = load_dataset(kind, data_files=path, split="train", cache_dir=out + "/cache")

def tokenize(examples):
    return tokenizer(examples["text"])

def group_texts(examples):
    joined = {k: list(chain(*examples[k])) for k in examples}
    total = len(joined["input_ids"]) // BLOCK * BLOCK
    result = {k: [t[i : i + BLOCK] for i in range(0, total, BLOCK)] for k, t in joined.items()}
    result["labels"] = result["input_ids"].copy()
    return result

tokenized = raw.map(tokenize, batched=True, num_proc=int(num_proc), remove_columns=raw.column_names)
blocks = tokenized.map(group_texts, batched=True, num_proc=int(num_proc))
blocks[0]
""".replace("BLOCK", str(BLOCK_SIZE))


def main() -> None:
    """Make the text, run both in turns, print the medians."""
    parser = argparse.ArgumentParser(description="Data preparation beside run_clm.py's way, whole commands.")
    parser.add_argument("--megabytes", type=int, default=100, help="of text; default: 100")
    parser.add_argument("--repeat", type=int, default=1, help="times that each is run, in turns; default: 1")
    parser.add_argument("--num-proc", type=int, default=2, help="worker processes; default: 2")
    parser.add_argument("--only-ours", action="store_true", help="leave run_clm.py's way out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_text(folder, arguments.megabytes * 1_000_000)
        tokenizer = folder / "tokenizer"
        run_ours("train-tokenizer", files["json"], "--vocab-size", 50_000, "--sample-bytes", "30MB", "--out", tokenizer)
        seconds: dict[tuple[str, str], list[float]] = {}
        num_tokens = 0
        for number in range(arguments.repeat):
            for kind, path in files.items():
                for way in ("ours",) if arguments.only_ours else ("ours", "run_clm"):
                    out = folder / f"{way}-{kind}"
                    if way == "ours":
                        words = ("--tokenizer", tokenizer, "--block-size", BLOCK_SIZE, "--num-proc", arguments.num_proc)
                        measured = run_ours("prep", path, *words, "--out", out)
                        manifest = json.loads((out / "manifest.json").read_text())
                        num_tokens = sum(
                            entry[split]["num_text_tokens"]
                            for entry in manifest["ledger"].values()
                            for split in ("train", "validation")
                        )
                        measured["encoder"] = manifest["encoder"]["name"]
                        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
                    else:
                        measured = run([sys.executable, "-c", RUN_CLM, kind, path, tokenizer, out, arguments.num_proc])
                        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
                    shutil.rmtree(out)
                    seconds.setdefault((kind, way), []).append(measured["seconds"])
                    record = {"variant": way, "format": kind, "megabytes": arguments.megabytes, "repetition": number}
                    record |= {"tokens": num_tokens, "tokens_per_s": round(num_tokens / measured["seconds"])}
                    print(
                        json.dumps({**record, **measured, "bytes_per_token": round(size / num_tokens, 2)}), flush=True
                    )
    print(f"\n{arguments.megabytes} MB of text, {num_tokens:,} tokens, {arguments.num_proc} processes\n")
    print("| format | ours, M tokens/s | run_clm.py's way, M tokens/s | ratio |\n|---|---|---|---|")
    for kind in files:
        ours = num_tokens / statistics.median(seconds[kind, "ours"]) / 1e6
        theirs = seconds.get((kind, "run_clm"))
        other = num_tokens / statistics.median(theirs) / 1e6 if theirs else None
        cells = (f"{other:.2f}", f"{ours / other:.1f}") if other else ("not run", "")
        print(f"| {kind} | {ours:.2f} | {cells[0]} | {cells[1]} |")


def write_text(folder: Path, num_bytes: int) -> dict[str, Path]:
    """The same documents as JSON lines and as Parquet (zstd), about so many bytes of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = {"json": folder / "text.jsonl", "parquet": folder / "text.parquet"}
    texts, left = [], num_bytes
    with open(paths["json"], "w", encoding="utf-8") as file:
        for text in iter_documents():
            if left <= 0:
                break
            left -= len(text.encode())
            texts.append(text)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    if left > 0:
        sys.exit(f"error: this machine has only {(num_bytes - left) / 1e6:.0f} MB of text; give a smaller --megabytes.")
    pq.write_table(pa.table({"text": texts}), paths["parquet"], compression="zstd", row_group_size=1000)
    return paths


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


def run_ours(*words: object) -> dict[str, float]:
    """One of our commands."""
    return run([sys.executable, "-m", "data_prep", *words])


def run(command: list[object]) -> dict[str, float]:
    """Seconds of a command, which must succeed, and the peak memory of the largest of its processes."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as output:
        started_at = time.perf_counter()
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, env=env, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started_at
        if status:
            output.seek(0)
            sys.exit(output.read())
    return {"seconds": round(seconds, 2), "peak_mib": round(usage.ru_maxrss / 1024)}


if __name__ == "__main__":
    main()
