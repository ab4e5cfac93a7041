"""From a checkpoint on disk into a trainer: model, optimizer and schedule, in the layout of this launch.

In: a checkpoint whose hashes were compared. Out: the trainer's state. One whose shards lie in `sharded/` (FSDP2, tensor
parallelism) is read by any number of processes, one process or DDP included, and the other way round. What DeepSpeed
wrote is read in every layout once it is converted (clm/universal.py); DeepSpeed reads its own only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clm import universal
from clm.divided import is_deepspeed_used
from clm.first_weights import fill_from_files
from clm.sharded import METADATA, SHARDED, is_sharded, load_model, load_optimizer, load_plain_optimizer
from data_prep.errors import UserError

if TYPE_CHECKING:
    from clm.plan import Plan
    from clm.trainer import ClmTrainer


def check_layout(checkpoint: Path, facts: dict[str, Any], plan: Plan) -> None:
    """Refuse a checkpoint that this launch cannot read.

    Raises:
        UserError: DeepSpeed's checkpoint, not converted, without DeepSpeed or with another number of processes; or
            another's with DeepSpeed.
    """
    files = facts["files"]
    wants_engine = is_deepspeed_used(plan.training)
    before, num_processes = facts["num_processes"], plan.num_processes
    is_other = universal.is_engines(files) and (not wants_engine or before != num_processes)
    if is_other and not universal.is_universal(files):
        what = f"with {num_processes} processes" if wants_engine else "without DeepSpeed"
        raise UserError(
            f"{checkpoint}: was written by DeepSpeed with {before} processes, each with its part of the optimizer, and "
            f"this launch is {what}. Convert it, then type this command again: {universal.convert_command(checkpoint)}"
        )
    if wants_engine and not universal.is_engines(files):
        how = "FSDP2 or tensor parallelism" if f"{SHARDED}/{METADATA}" in files else "DDP or one process"
        raise UserError(
            f"{checkpoint}: was written by {how}, which DeepSpeed cannot read. Continue without DeepSpeed, for example "
            "with accelerate_configs/fsdp2.yaml; or begin a new run from its weights with model.init and another "
            "training.run_name."
        )


def is_ours(trainer: ClmTrainer, checkpoint: str) -> bool:
    """Whether model and optimizer are loaded here and not by stock: divided in the trainer, or on the disk."""
    is_divided = is_sharded(Path(checkpoint)) or (Path(checkpoint) / universal.LATEST).is_file()
    return not trainer.is_deepspeed_enabled and (trainer.is_divided or is_divided)


def load_weights(trainer: ClmTrainer, checkpoint: str) -> None:
    """The model's weights."""
    folder = Path(checkpoint)
    if is_sharded(folder):
        load_model(folder, trainer.model)
    elif (folder / universal.LATEST).is_file():
        universal.load_weights(folder, trainer.model)
    else:
        fill_from_files(trainer.model, str(folder))


def load_optimizer_and_scheduler(trainer: ClmTrainer, checkpoint: str) -> None:
    """The optimizer's state and the position in the schedule."""
    folder = Path(checkpoint)
    if is_sharded(folder):
        load_optimizer(folder, trainer.model, trainer.optimizer)
    elif (folder / universal.LATEST).is_file():
        universal.load_optimizer(folder, trainer.model, trainer.optimizer)
    else:
        load_plain_optimizer(folder / "optimizer.pt", trainer.optimizer)
    trainer.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
