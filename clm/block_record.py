"""What a rank really consumed, step by step: runs/<name>/blocks-<rank>.jsonl, where `run.record_blocks` is true.

One line per step: {"step", "num_processes", "samples": [sample numbers in the order they were trained on], "sha256": of
the input ids, int64 in C order}. It is noted where the model gets the batch, not where the loader reads ahead.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from clm.dataset import FILLER
from clm.metrics import JsonLines
from clm.run_folder import read_json_lines


class BlockRecord(TrainerCallback):
    """Collects the micro-batches of a step and writes its line when the step ends."""

    def __init__(self, run: Path, rank: int, tp_size: int = 1):
        self.file = JsonLines(block_record_path(run, rank // tp_size))
        self.is_writer, self.tp_size = rank % tp_size == 0, tp_size  # of those that see the same rows one
        self._start()

    def note(self, inputs: dict[str, Any]) -> None:
        """Take the sample numbers out of a micro-batch and note them with its tokens."""
        samples = inputs.pop("samples").cpu()
        is_real = samples != FILLER
        self.samples += dict.fromkeys(samples[is_real].tolist())  # run.speed: stock has one for each row
        blocks = inputs["input_ids"].to("cpu", torch.int64).reshape(len(samples), -1)[is_real]
        self.digest.update(blocks.contiguous().numpy().tobytes())

    def on_step_end(self, args, state, control, **kwargs):
        num_processes = args.world_size // self.tp_size
        record = {"step": state.global_step, "num_processes": num_processes, "samples": self.samples}
        if self.is_writer:
            self.file.write({**record, "sha256": self.digest.hexdigest()})
        self._start()

    def _start(self) -> None:
        self.samples: list[int] = []
        self.digest = hashlib.sha256()


def block_record_path(run: Path, rank: int) -> Path:
    """Where a rank's record lies."""
    return run / f"blocks-{rank}.jsonl"


def read_batches(run: Path) -> dict[int, list[dict[str, Any]]]:
    """Step -> the records of its ranks, in their order."""
    ranks: dict[int, dict[int, dict[str, Any]]] = {}
    for path in run.glob("blocks-*.jsonl"):
        rank = int(path.stem.partition("-")[2])
        for record in read_json_lines(path):
            ranks.setdefault(record["step"], {})[rank] = record
    # a rank that a later start no longer had has left its file as it was
    return {s: [of[r] for r in range(of[0]["num_processes"])] for s, of in sorted(ranks.items()) if 0 in of}
