"""How fast does a training read its blocks, through the DataLoader, beside stock ways of reading the same rows?

    python benchmarks/reading.py DATASET              a prepared dataset; prints JSON lines and a table
    python benchmarks/reading.py data/fineweb --rows 8 64         micro-batches of 8 rows, and of 64

Random rows as micro-batches of int64. In turns: ours (the order, the memory map and the collator of a run, in a torch
DataLoader; each row with the token after it, of which the device makes inputs and targets), run_clm.py's way (rows of
`datasets` as Python lists, transformers' default_data_collator, the same DataLoader), `ds[i]` alone, nanoGPT's
get_batch, and a NumPy gather of such rows, both out of memory. "Cold": the files were dropped from the page cache just
before, and the disk answers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clm.dataset import TrainBlocks, collate
from clm.host_memory import keep_freed_memory
from clm.order import Order, OrderSource, OrderStage
from data_prep.blocks import Blocks
from data_prep.paths import dataset_folder


def main() -> None:
    """Measure each way in turns, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a prepared dataset: its name or folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128], help="of a micro-batch; default: 32 128")
    parser.add_argument("--repeat", type=int, default=5, help="times that each is run, in turns; default: 5")
    parser.add_argument("--seconds", type=float, default=1.0, help="that each is run for; default: 1")
    arguments = parser.parse_args()
    folder = dataset_folder(arguments.dataset)
    keep_freed_memory()  # as a run does; here for all ways
    blocks = Blocks(folder, "train")
    in_memory = np.concatenate([blocks.shard_tokens(n) for n in range(len(blocks.manifest.splits["train"].shards))])
    for rows in arguments.rows:
        compare(folder, blocks, in_memory, rows, arguments.repeat, arguments.seconds)


def compare(folder: Path, blocks: Blocks, in_memory: np.ndarray, rows: int, repeat: int, seconds: float) -> None:
    """Each way in turns, with micro-batches of so many rows."""
    ways: dict[str, Callable[[], Iterator[int]]] = {
        "ours, 0 workers": lambda: ours(folder, rows, 0),
        "ours, 1 worker": lambda: ours(folder, rows, 1),
        "ours, 2 workers": lambda: ours(folder, rows, 2),
        "run_clm.py's, 0 workers": lambda: stock(folder, rows, 0),
        "run_clm.py's, 2 workers": lambda: stock(folder, rows, 2),
        "ds[i]": lambda: single_rows(folder),
        "get_batch": lambda: get_batch(in_memory, rows, blocks.block_size),
        "NumPy gather": lambda: gather(in_memory.reshape(-1, blocks.block_size), rows),
        "ours, 0 workers, cold": lambda: ours(folder, rows, 0),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeat):
        for name, way in ways.items():
            speed = measure(way, seconds, folder if name.endswith("cold") else None)
            speeds[name].append(speed)
            record = {"variant": name, "repetition": number, "rows_per_s": round(speed), "rows": rows}
            print(json.dumps({**record, "block_size": blocks.block_size}), flush=True)
    print(f"\n{blocks.num_blocks:,} blocks of {blocks.block_size:,} tokens, micro-batches of {rows} rows\n")
    print("| way | rows/s | M tokens/s | ours (0 workers, warm) is so many times as fast |\n|---|---|---|---|")
    reference = statistics.median(speeds["ours, 0 workers"])
    for name, measured in speeds.items():
        median = statistics.median(measured)
        print(f"| {name} | {median:,.0f} | {median * blocks.block_size / 1e6:,.0f} | {reference / median:.2f} |")


def ours(folder: Path, rows: int, num_workers: int) -> Iterator[int]:
    """What a run does: TrainBlocks in its order, `collate`, and the DataLoader that Trainer makes."""
    blocks = Blocks(folder, "train")
    order = Order([OrderSource(blocks.num_blocks)], [OrderStage(None, (Fraction(1),))], seed=1)
    dataset = TrainBlocks([blocks], order, blocks.block_size, num_samples=10**9)
    collator = partial(collate, with_labels=False)
    loader = torch.utils.data.DataLoader(
        dataset, rows, sampler=range(10**9), num_workers=num_workers, collate_fn=collator
    )
    return (len(batch["tokens"]) for batch in loader)


def stock(folder: Path, rows: int, num_workers: int) -> Iterator[int]:
    """run_clm.py: rows with a column of labels beside, shuffled, transformers' default_data_collator."""
    from datasets import load_from_disk
    from transformers import default_data_collator

    dataset = load_from_disk(str(folder / "train"))
    with_labels = _WithLabels(dataset)
    loader = torch.utils.data.DataLoader(
        with_labels, rows, shuffle=True, num_workers=num_workers, collate_fn=default_data_collator
    )
    while True:
        yield from (len(batch["input_ids"]) for batch in loader)


class _WithLabels(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict:
        ids = self.dataset[number]["input_ids"]
        return {"input_ids": ids, "labels": ids}


def single_rows(folder: Path) -> Iterator[int]:
    """Random rows of `datasets`, one by one."""
    from datasets import load_from_disk

    dataset = load_from_disk(str(folder / "train"))
    numbers = np.random.default_rng(0)
    while True:
        dataset[int(numbers.integers(len(dataset)))]
        yield 1


def get_batch(tokens: np.ndarray, rows: int, block_size: int) -> Iterator[int]:
    """As nanoGPT's train.py draws inputs and targets, without a DataLoader, an order or an end; source:
    github.com/karpathy/nanoGPT, get_batch."""
    while True:
        starts = torch.randint(len(tokens) - block_size, (rows,))
        inputs = torch.stack([torch.from_numpy(tokens[i : i + block_size].astype(np.int64)) for i in starts])
        torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts])
        yield len(inputs)


def gather(tokens: np.ndarray, rows: int) -> Iterator[int]:
    """Random rows out of an array in memory, to int64."""
    numbers = np.random.default_rng(0)
    while True:
        tokens[numbers.integers(len(tokens), size=rows)].astype(np.int64)
        yield rows


def measure(way: Callable[[], Iterator[int]], seconds: float, cold: Path | None) -> float:
    """Rows per second after the first micro-batch."""
    batches = way()
    if cold is not None:
        for path in (cold / "train").glob("*.arrow"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    next(batches)
    num_rows, started_at = 0, time.perf_counter()
    while time.perf_counter() - started_at < seconds:
        num_rows += next(batches)
    return num_rows / (time.perf_counter() - started_at)


if __name__ == "__main__":
    main()
