"""What each packing costs: padding, documents that are cut, and time. Whole commands, start-up included, in turns.

    python benchmarks/packing.py                                 200 MB of this machine's text
    python benchmarks/packing.py --source notes.jsonl --block-sizes 512 2048
    python benchmarks/packing.py --source text.txt --prep-args="--split-lines" --repeat 3

Prints a table: the shares are those of the train split; the time is the median of the processor time of all processes,
as a multiple of concat's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from texts import write_texts

ROOT = Path(__file__).resolve().parent.parent
PACKINGS = ("concat", "best_fit", "pad")


def main() -> None:
    """Make the text and a tokenizer, and prepare it in every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="what prep is given instead of this machine's text")
    parser.add_argument("--prep-args", default="", help="options of prep for it")
    parser.add_argument("--megabytes", type=int, default=200, help="of this machine's text; default: 200")
    parser.add_argument("--vocab-size", type=int, default=50_000, help="of the tokenizer trained on it; default: 50000")
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[512, 2048, 8192], help="default: 512 2048 8192")
    parser.add_argument("--repeat", type=int, default=1, help="times that each is run, in turns; default: 1")
    parser.add_argument("--num-proc", type=int, default=2, help="worker processes; default: 2")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = arguments.source or write_texts(folder, arguments.megabytes * 1_000_000)["json"]
        vocabulary = ("--vocab-size", arguments.vocab_size, "--sample-bytes", "30MB")
        run("train-tokenizer", source, *vocabulary, "--out", folder / "tokenizer")
        print("| block_size | packing | blocks | padding, % | cut, % | longer than a block, % | processor time |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for block_size in arguments.block_sizes:
            options = (
                "--tokenizer",
                folder / "tokenizer",
                "--block-size",
                block_size,
                "--num-proc",
                arguments.num_proc,
            )
            compare(source, folder / "out", block_size, (*options, *shlex.split(arguments.prep_args)), arguments.repeat)


def compare(source: str, out: Path, block_size: int, options: list[object], repeat: int) -> None:
    """All packings in turns; their rows of the table."""
    seconds: dict[str, list[float]] = {packing: [] for packing in PACKINGS}
    splits = {}
    for _ in range(repeat):
        for packing in PACKINGS:
            seconds[packing].append(run("prep", source, *options, "--packing", packing, "--out", out))
            splits[packing] = json.loads((out / "manifest.json").read_text())["splits"]["train"]
            shutil.rmtree(out)
    reference = statistics.median(seconds["concat"])
    for packing, split in splits.items():
        num, padding = split["num_documents"], split["num_padding_tokens"] / (split["num_blocks"] * block_size)
        shares = [f"{100 * share:.2f}" for share in (padding, split["num_cut"] / num, split["num_long"] / num)]
        ratio = statistics.median(seconds[packing]) / reference
        print(
            f"| {block_size:,} | {packing} | {split['num_blocks']:,} | {' | '.join(shares)} | {ratio:.2f} |", flush=True
        )
    print(f"{num:,} documents, {split['num_tokens']:,} tokens; processor seconds {seconds}", file=sys.stderr)


def run(*words: object) -> float:
    """Seconds of processor time of a command of data_prep, its workers included."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "data_prep", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)


if __name__ == "__main__":
    main()
