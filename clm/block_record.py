"""What a rank really consumed, step by step: runs/<name>/blocks-<rank>.jsonl, where `run.record_blocks` is true.

One line per step: {"step", "samples": [sample numbers in the order they were trained on], "sha256": of the input ids,
int64 in C order}. It is noted where the model gets the batch, not where the loader reads ahead.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from clm.metrics import JsonLines


class BlockRecord(TrainerCallback):
    """Collects the micro-batches of a step and writes its line when the step ends."""

    def __init__(self, run: Path, rank: int):
        self.file = JsonLines(block_record_path(run, rank))
        self._start()

    def note(self, inputs: dict[str, Any]) -> None:
        """Take the sample numbers out of a micro-batch and note them with its tokens."""
        self.samples += inputs.pop("samples").tolist()
        self.digest.update(inputs["input_ids"].to("cpu", torch.int64).contiguous().numpy().tobytes())

    def on_step_end(self, args, state, control, **kwargs):
        self.file.write({"step": state.global_step, "samples": self.samples, "sha256": self.digest.hexdigest()})
        self._start()

    def _start(self) -> None:
        self.samples: list[int] = []
        self.digest = hashlib.sha256()


def block_record_path(run: Path, rank: int) -> Path:
    """Where a rank's record lies."""
    return run / f"blocks-{rank}.jsonl"
