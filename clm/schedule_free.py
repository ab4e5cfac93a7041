"""Schedule-free optimizers (`training.optim: schedule_free_adamw` and its like) have two sets of weights.

In: a trainer whose optimizer may be one of them; with any other nothing happens here. Gradients are taken at y; x, a
mean over the steps, is what evaluation, samples, checkpoints' model files and final/ have. A resume needs y to the bit,
which x and the optimizer's state do not give back, so a checkpoint has it too.

Source: Defazio et al., "The Road Less Scheduled", 2024; schedulefree's `optimizer.train()` and `optimizer.eval()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clm.divided import is_engine_used

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from clm.recipe import Recipe

PREFIX = "schedule_free"
FILE = "training_weights.pt"  # y by parameter names, in a checkpoint


def check_schedule_free(recipe: Recipe, training: dict[str, Any]) -> None:
    """Refuse what does not go with a schedule-free optimizer; problems go to recipe.problems."""
    optim = str(training.get("optim", ""))
    if not optim.startswith(PREFIX):
        return
    problems, kind = recipe.problems, training.get("lr_scheduler_type", "linear")
    if kind != "constant":
        problems.add(
            "training.optim",
            f"is {optim}, which takes the place of a schedule, but training.lr_scheduler_type is {kind}. Set "
            "training.lr_scheduler_type: constant; training.warmup_steps is the optimizer's own.",
        )
    if optim == f"{PREFIX}_radam" and (training.get("warmup_steps") or 0) > 0:
        problems.add("training.warmup_steps", f"is set but training.optim is {optim}, which has no warm-up. Remove it.")
    if is_engine_used(training):
        problems.add(
            "training.optim",
            f"is {optim} but the weights are divided among processes (DeepSpeed, FSDP or tensor parallelism). Use "
            "DDP, or adamw_torch_fused with a schedule.",
        )


def begin_training(optimizer: Any) -> None:
    """The weights are those that train; a resumed optimizer is there already."""
    if _is_schedule_free(optimizer):
        _plain(optimizer).train()


@contextlib.contextmanager
def evaluation_weights(optimizer: Any) -> Iterator[None]:
    """The model has the weights to be used (x), afterwards those that train again, bit by bit."""
    if optimizer is None or not _is_schedule_free(optimizer):
        yield
        return
    optimizer = _plain(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()  # its way back rounds
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def weights_to_save(model: PreTrainedModel, optimizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A model's state for the files of a checkpoint, and what the checkpoint has beside it; live but for x, a copy."""
    if not _is_schedule_free(optimizer):
        return model.state_dict(), {}
    state, copies = {}, {}
    with evaluation_weights(optimizer):
        for name, value in model.state_dict().items():
            if value.data_ptr() not in copies:  # tied weights stay one
                copies[value.data_ptr()] = value.clone()
            state[name] = copies[value.data_ptr()]
    return state, {FILE: {name: parameter.detach() for name, parameter in model.named_parameters()}}


def load_training_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """The weights that train, where the checkpoint has them beside its model."""
    if (checkpoint / FILE).is_file():
        saved = torch.load(checkpoint / FILE, map_location="cpu", mmap=True, weights_only=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[name])


def _is_schedule_free(optimizer: Any) -> bool:
    return any("train_mode" in group for group in _plain(optimizer).param_groups)


def _plain(optimizer: Any) -> Any:
    """Below accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
