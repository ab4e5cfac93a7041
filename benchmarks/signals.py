"""What does it cost each step to look for a request to stop? One process, and two that agree over gloo.

    python benchmarks/signals.py           prints JSON lines and a table

A step is a sleep of 5 ms, and with two processes a barrier, which stands for the all-reduce of the gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clm.signals import Requests

NUM_STEPS = 1000
STEP_S = 0.005


def measure(rank: int, num_processes: int, folder: str) -> None:
    """Time what Trainer calls at the beginning and the end of a step; rank 0 prints."""
    torch.set_num_threads(1)
    if num_processes > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=num_processes)
    args = SimpleNamespace(world_size=num_processes, ddp_timeout=60)
    state = SimpleNamespace(global_step=0, max_steps=NUM_STEPS)
    took = []
    with Requests(Path(folder), rank) as requests:
        requests.trainer = SimpleNamespace(outcome="stopped")
        requests.on_train_begin(args, state, None)
        for _ in range(NUM_STEPS):
            time.sleep(STEP_S)
            if num_processes > 1:
                dist.barrier()
            started_at = time.perf_counter()
            requests.on_step_begin(args, state, None)
            requests.on_step_end(args, state, None)
            took.append(1e6 * (time.perf_counter() - started_at))
        requests.on_train_end(args, state, None)
    if rank == 0:
        median, most = np.percentile(took[10:], [50, 99])
        print(json.dumps({"num_processes": num_processes, "median_us": median, "percentile_99_us": most}), flush=True)
        print(f"| {num_processes} | {median:.0f} us | {most:.0f} us |", file=sys.stderr)
    if num_processes > 1:
        dist.destroy_process_group()


def main() -> None:
    """Measure with one process, then with two, three times each."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"| processes | median | 99 of 100 steps |  {os.cpu_count()} cores\n|---|---|---|", file=sys.stderr)
    for _ in range(3):
        for num_processes in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(measure, (num_processes, folder), nprocs=num_processes)


if __name__ == "__main__":
    main()
