"""Which processes of a launch write to the same disk, and which of them writes what is there once.

In: the run folder as each process sees it. Out: the ranks that share it. Nothing is assumed about nodes: each process
leaves a file with a random name and looks for those of the others.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from accelerate.utils import gather_object

from data_prep.errors import UserError


def find_ranks_of_disk(run: Path, rank: int, world_size: int) -> list[int]:
    """The ranks whose run folder is this one: all of them on one machine or a shared file system. A collective."""
    if world_size == 1:
        return [0]
    run.mkdir(parents=True, exist_ok=True)
    names = gather_object([f".rank-{rank}-{uuid.uuid4().hex}"])
    (run / names[rank]).touch()
    gather_object([rank])  # everyone has written
    seen = [other for other, name in enumerate(names) if (run / name).exists()]
    gather_object([rank])  # everyone has looked
    (run / names[rank]).unlink()
    return seen


def choose_publisher(run: Path, ranks: list[int], should_save: bool) -> int:
    """The rank that writes model and optimizer to the disk of `ranks` and publishes checkpoints there. A collective.

    Args:
        should_save: TrainingArguments.should_save of this process.
    Raises:
        UserError: on some disk none may; all processes raise it.
    """
    answers = gather_object([(ranks, should_save)])
    able = {rank for rank, (_, may_save) in enumerate(answers) if may_save}
    without = next((others for others, _ in answers if not able & set(others)), None)
    if without is not None:
        raise UserError(
            f"{run}: is another folder for process {without[0]} than for process 0, which alone writes checkpoints, so "
            "this run could not be resumed. Set RUNS_DIR to a shared file system, or training.save_on_each_node: true."
        )
    return min(able & set(ranks))
