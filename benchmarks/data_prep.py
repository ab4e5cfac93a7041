"""How fast is text turned into blocks, beside other ways? Whole commands, start-up included, in turns.

    python benchmarks/data_prep.py                              100 MB of text; prints JSON lines and tables
    python benchmarks/data_prep.py --megabytes 500 --ways ours run_clm
    python benchmarks/data_prep.py --parts --megabytes 500      where our time goes, in one process
    python benchmarks/data_prep.py --memory 100 1000 10000      our peak memory by the size of the input, in MB

The text is what lies on this machine: source code and documentation of its Python and its packages, no file twice, as
JSON lines and as Parquet, two files each. All ways use the same trained tokenizer and two processes where they can;
each is a script in benchmarks/ways/. Tokens are those of the text. `--memory` needs more text than there is, and
repeats it with a number in front of each document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from texts import write_repeated, write_texts

ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "ours": "ours",
    "run_clm": "run_clm.py: datasets.map, group_texts",
    "nanogpt": "nanoGPT: tiktoken, memmap",
    "llm_foundry": "llm-foundry: MDS",
    "datatrove_tokens": "datatrove: DocumentTokenizer",
}
BLOCK_SIZE = 2048


def main() -> None:
    """Make the text and do one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="of text; default: 100")
    parser.add_argument("--repeat", type=int, default=1, help="times that each is run, in turns; default: 1")
    parser.add_argument("--num-proc", type=int, default=2, help="worker processes; default: 2")
    parser.add_argument("--formats", nargs="+", choices=("json", "parquet"), default=["json", "parquet"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all that install")
    parser.add_argument("--parts", action="store_true", help="where our time goes instead")
    parser.add_argument("--memory", nargs="+", type=int, metavar="MB", help="our peak memory by size instead")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.memory:
            measure_memory(folder, arguments.memory, arguments.num_proc)
            return
        files = write_texts(folder, arguments.megabytes * 1_000_000)
        tokenizer = folder / "tokenizer"
        train_tokenizer(files["json"], tokenizer)
        if arguments.parts:
            for kind in arguments.formats:
                subprocess.run(
                    [sys.executable, ROOT / "benchmarks" / "parts.py", files[kind], tokenizer, folder / "out"],
                    check=True,
                )
            return
        compare(folder, files, tokenizer, arguments)


def compare(folder: Path, files: dict[str, str], tokenizer: Path, arguments: argparse.Namespace) -> None:
    """All ways in turns; a table of medians."""
    measured: dict[tuple[str, str], list[dict[str, float]]] = {}
    num_tokens = 0
    for number in range(arguments.repeat):
        for kind in arguments.formats:
            for way in arguments.ways:
                out = folder / "out"
                result = run(make_command(way, kind, files[kind], tokenizer, out, arguments.num_proc), out)
                if result is None:
                    print(f"{WAYS[way]}: not installed, or it failed", file=sys.stderr)
                    continue
                if way == "ours":
                    num_tokens = count_tokens(out)
                size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
                shutil.rmtree(out)
                result |= {"tokens_per_s": round(num_tokens / result["seconds"])}
                result |= {"bytes_per_token": round(size / num_tokens, 2)}
                result |= {"peak_bytes_per_token": round(result["peak_disk_bytes"] / num_tokens, 2)}
                measured.setdefault((kind, way), []).append(result)
                record = {"variant": way, "format": kind, "megabytes": arguments.megabytes, "repetition": number}
                print(json.dumps({**record, "tokens": num_tokens, **result}), flush=True)
    print(f"\n{arguments.megabytes} MB of text, {num_tokens:,} tokens, {arguments.num_proc} processes\n")
    print("| format | way | M tokens/s | ours is so many times as fast | bytes per token, end and peak | peak MiB |")
    print("|---|---|---|---|---|---|")
    for (kind, way), results in measured.items():
        speed, ours = (
            statistics.median(each["tokens_per_s"] for each in measured[kind, name]) / 1e6 for name in (way, "ours")
        )
        first = results[0]
        print(
            f"| {kind} | {WAYS[way]} | {speed:.2f} | {ours / speed:.1f} | {first['bytes_per_token']}, "
            f"{first['peak_bytes_per_token']} | {first['peak_mib']} |"
        )


def make_command(way: str, kind: str, files: str, tokenizer: Path, out: Path, num_proc: int) -> list[object]:
    """The command line of one way."""
    if way == "ours":
        return prep(files, tokenizer, out, num_proc)
    return [sys.executable, ROOT / "benchmarks" / "ways" / f"{way}.py", kind, files, tokenizer, out, num_proc]


def prep(files: str, tokenizer: Path, out: Path, num_proc: int) -> list[object]:
    """Our command line."""
    options = ("--tokenizer", tokenizer, "--block-size", BLOCK_SIZE, "--num-proc", num_proc, "--out", out)
    return [sys.executable, "-m", "data_prep", "prep", files, *options]


def train_tokenizer(files: str, out: Path) -> None:
    """50,000 entries, as many as llama_170m's."""
    words = (files, "--vocab-size", 50_000, "--sample-bytes", "30MB", "--out", out)
    if run([sys.executable, "-m", "data_prep", "train-tokenizer", *words], out) is None:
        sys.exit(2)


def count_tokens(out: Path) -> int:
    """Tokens of the text, without separators."""
    ledger = json.loads((out / "manifest.json").read_text())["ledger"]
    return sum(entry[split]["num_text_tokens"] for entry in ledger.values() for split in ("train", "validation"))


def measure_memory(folder: Path, sizes: list[int], num_proc: int) -> None:
    """Peak memory of each of our processes, for growing inputs."""
    first = write_texts(folder / "tokenizer-text", 50_000_000)
    tokenizer = folder / "tokenizer"
    train_tokenizer(first["json"], tokenizer)
    print("| MB of text | tokens | peak MiB of the largest process | bytes per token, end and peak | M tokens/s |")
    print("|---|---|---|---|---|", flush=True)
    for megabytes in sizes:
        text, out = folder / f"text-{megabytes}.jsonl", folder / "out"
        write_repeated(text, megabytes * 1_000_000)
        result = run(prep(str(text), tokenizer, out, num_proc), out)
        text.unlink()
        num_tokens = count_tokens(out)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        shutil.rmtree(out)
        print(
            f"| {megabytes:,} | {num_tokens:,} | {result['peak_mib']} | {size / num_tokens:.2f}, "
            f"{result['peak_disk_bytes'] / num_tokens:.2f} | {num_tokens / result['seconds'] / 1e6:.1f} |",
            flush=True,
        )


def run(command: list[object], out: Path) -> dict[str, float] | None:
    """Seconds of a command, peak memory of its largest process, largest size of `out`; None: it failed."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    peak, memory, is_done = [0], [0], threading.Event()
    out.mkdir(parents=True, exist_ok=True) if "ways" in str(command[1]) else None
    with tempfile.TemporaryFile("w+") as output:
        started_at = time.perf_counter()
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, env=env, stdout=output, stderr=output)
        watches = [
            threading.Thread(target=watch_disk, args=(out, peak, is_done)),
            threading.Thread(target=watch_memory, args=(process.pid, memory, is_done)),
        ]
        for watch in watches:
            watch.start()
        status = process.wait()
        seconds = time.perf_counter() - started_at
        is_done.set()
        for watch in watches:
            watch.join()
        if status:
            output.seek(0)
            print(output.read()[-2000:], file=sys.stderr)
            shutil.rmtree(out, ignore_errors=True)
            return None
    return {"seconds": round(seconds, 2), "peak_mib": round(memory[0] / 2**20), "peak_disk_bytes": peak[0]}


def watch_memory(pid: int, peak: list[int], is_done: threading.Event) -> None:
    """Note the largest memory of one process among these and all that it started, looked at ten times a second."""
    import psutil

    while not is_done.wait(0.1):
        with suppress(psutil.Error):
            for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                with suppress(psutil.Error):
                    memory = process.memory_info()
                    peak[0] = max(peak[0], memory.rss - memory.shared)  # without files that are mapped


def watch_disk(out: Path, peak: list[int], is_done: threading.Event) -> None:
    """Note the largest size of a folder, looked at ten times a second."""
    while not is_done.wait(0.1):
        size = 0
        for root, _, names in os.walk(out):
            for name in names:
                try:
                    size += os.lstat(os.path.join(root, name)).st_size
                except OSError:  # gone since
                    continue
        peak[0] = max(peak[0], size)


if __name__ == "__main__":
    main()
