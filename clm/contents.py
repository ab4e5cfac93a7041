"""What a checkpoint holds: collected from a trainer, and written under the names of stock's files.

In: a trainer between two steps. Out: a nest of live tensors (`collect`), which may be copied before it is written
(`write_files`). Stock's loading reads what is written here.
"""

from __future__ import annotations

import copy
import functools
import platform
import random
import re
import shutil
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.training_args import ParallelMode

from clm.order import ORDER_VERSION
from clm.run_folder import EMA
from clm.schedule_free import weights_to_save

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from clm.trainer import ClmTrainer

# Files that each rank writes for itself: stock's random state, DeepSpeed's shards, FSDP2's. All others are the
# publisher's.
_RANK_FILE = re.compile(
    r"rng_state_(\d+)\.pth$|(?:^|/)(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank|^sharded/__(\d+)[._]|^ballast-(\d+)$"
)


def collect(trainer: ClmTrainer, is_publisher: bool) -> dict[str, Any]:
    """This rank's part of a checkpoint; nothing is copied.

    Args:
        is_publisher: model, optimizer and trainer state are this rank's to write, not only its random state. Under
            FSDP2 and tensor parallelism model and optimizer are not in it (clm/sharded.py).
    """
    args = trainer.args
    name = "rng_state.pth" if args.world_size == 1 else f"rng_state_{args.process_index}.pth"
    files: dict[str, Any] = {name: random_state(args.parallel_mode == ParallelMode.DISTRIBUTED)}
    if not is_publisher:
        return {"files": files}
    if not trainer.is_divided:
        files["optimizer.pt"] = trainer.optimizer.state_dict()
    files["scheduler.pt"] = trainer.lr_scheduler.state_dict()
    if getattr(trainer.accelerator, "scaler", None) is not None:
        files["scaler.pt"] = trainer.accelerator.scaler.state_dict()
    state = {"files": files, "trainer_state": trainer_state(trainer)}
    if trainer.ema is not None:
        state["ema"] = trainer.ema.state()
    if not trainer.is_divided:
        state["model"], more = weights_to_save(trainer.model, trainer.optimizer)
        files |= more
    return state


def checkpoint_facts(trainer: ClmTrainer) -> dict[str, Any]:
    """What checkpoint.json says besides the files. A collective."""
    summed_loss = trainer.accelerator.gather(trainer._tr_loss).mean().item()
    return {
        "step": trainer.state.global_step,
        "tokens": trainer.num_tokens,
        "time_s": trainer.progress.seconds,
        "order_version": ORDER_VERSION,
        "num_processes": trainer.args.world_size,
        "pending_loss": {"since_step": trainer._globalstep_last_logged, "summed_loss": summed_loss},
        "datasets": trainer.plan.fingerprints,
        "excluded": [list(r) for r in trainer.plan.timeline.excluded],
        "eval_loss": trainer._evaluated.get(trainer.state.global_step),
        "spikes": trainer.spikes.state(),
    }


def random_state(is_distributed: bool) -> dict[str, Any]:
    """What stock's rng_state.pth holds (transformers/trainer.py, _save_rng_state), for CPU and CUDA."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        cuda = torch.cuda.random
        state["cuda"] = cuda.get_rng_state_all() if is_distributed else cuda.get_rng_state()
    return state


def trainer_state(trainer: ClmTrainer) -> TrainerState:
    """A copy of the trainer's state, completed as stock's _save_checkpoint does."""
    state = copy.copy(trainer.state)
    state.log_history = list(state.log_history)  # its entries are never changed again
    state.stateful_callbacks = copy.deepcopy(state.stateful_callbacks)
    for each in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(each, ExportableState):
            state.stateful_callbacks[each.__class__.__name__] = each.state()
    return state


def write_files(
    folder: Path, state: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Path
) -> None:
    """Write what `collect` returned, or a copy of it.

    Args:
        model: its class and config; the weights are the state's.
        tokenizer: not one that another thread uses.
        recipe: the run's recipe.yaml.
    """
    for name, value in state["files"].items():
        torch.save(value, folder / name)
    if "model" in state:
        model.save_pretrained(folder, state_dict=dict(state["model"]))
    if "ema" in state:
        model.save_pretrained(folder / EMA, state_dict=dict(state["ema"]))
    if "trainer_state" in state:
        if "model" not in state:
            write_configs(folder, model)
        tokenizer.save_pretrained(folder)
        state["trainer_state"].save_to_json(str(folder / "trainer_state.json"))
        write_texts(folder, recipe)


def write_configs(folder: Path, model: PreTrainedModel) -> None:
    """config.json and generation_config.json, with which the shards can be made a model."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = next(model.parameters()).dtype
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def write_texts(folder: Path, recipe: Path) -> None:
    """recipe.yaml and environment.txt."""
    (folder / "environment.txt").write_text(describe_environment(), encoding="utf-8")
    if recipe.is_file():
        shutil.copyfile(recipe, folder / recipe.name)


@functools.cache
def describe_environment() -> str:
    """environment.txt: Python, platform, and the versions of all installed packages."""
    packages = sorted({f"{d.name}=={d.version}" for d in distributions() if d.name}, key=str.lower)
    return "\n".join([f"# Python {platform.python_version()}, {platform.platform()}", *packages]) + "\n"


def own_files(folder: Path, rank: int, publisher: int) -> list[str]:
    """The files in a folder that a rank has written: those with its number and, for the publisher, the rest."""
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    owners = {name: next(filter(None, match.groups())) for name in names if (match := _RANK_FILE.search(name))}
    return sorted(name for name in names if int(owners.get(name, publisher)) == rank)
