"""An exponential moving average of the weights, kept beside the training, which it does not change (`run.ema`).

In: a model, after each of its updates. Out: averaged weights, in Hub format in `ema/` of each checkpoint and at the end
in runs/<name>/final-ema, and their own validation loss in metrics.jsonl.

    average <- d x average + (1 - d) x weights    after step k, d = min(decay, (1 + k) / (10 + k))

d is smaller at first, so that the average soon forgets the first weights; it follows from the step alone, so a resume
needs nothing but the average. Source: TensorFlow, tf.train.ExponentialMovingAverage, `num_updates`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from clm.divided import is_engine_used
from clm.first_weights import weights_of_folder
from clm.metrics import log
from clm.run_folder import EMA

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from clm.recipe import Recipe

PREFIX = "eval_ema_"  # of its metrics; those of the weights themselves begin with eval_


def check_ema(recipe: Recipe, training: dict[str, Any], names: list[str]) -> None:
    """Refuse what does not work with run.ema; problems go to recipe.problems.

    Args:
        names: of the validation sets.
    """
    if recipe.run.ema.decay is None:
        return
    if is_engine_used(training):
        recipe.problems.add(
            "run.ema",
            "is set but the weights are divided among processes (DeepSpeed, FSDP or tensor parallelism), and each "
            "would average what it holds only while it is whole. Use DDP, or remove it.",
        )
    if str(training.get("optim", "")).startswith("schedule_free"):
        recipe.problems.add(
            "run.ema",
            f"is set but training.optim is {training['optim']}, which averages its weights itself. Remove it.",
        )
    if "ema" in names:
        recipe.problems.add(
            "run.ema", "is set and a validation set is called ema: metrics.jsonl could not tell them apart. Rename it."
        )


class Ema(TrainerCallback):
    """The average, in fp32 on the model's device: 4 bytes for each parameter, the same on every process.

    Args:
        model: with its first weights, which the average begins as.
        decay: d's upper limit, below 1.
    """

    def __init__(self, model: PreTrainedModel, decay: float):
        self.model, self.decay = model, decay
        self.weights = [*model.parameters()]  # tied ones once
        self.averages = [weight.detach().to(torch.float32, copy=True) for weight in self.weights]

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        k = state.global_step
        decay = min(self.decay, (1 + k) / (10 + k))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)  # queued: nothing waits for the device

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights; afterwards its own again, bit by bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, average in zip(self.weights, self.averages, strict=True):
            kept = weight.clone()  # copied, not swapped: compiled graphs may have kept the address
            weight.copy_(average)
            average.copy_(kept)

    def state(self) -> dict[str, torch.Tensor]:
        """The averages under the names of the model's state, live; tied ones are one tensor."""
        owners = {weight.data_ptr(): average for weight, average in zip(self.weights, self.averages, strict=True)}
        return {name: owners.get(value.data_ptr(), value) for name, value in self.model.state_dict().items()}

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint's average; from its weights where it has none, because run.ema was set later."""
        folder = checkpoint / EMA
        source = weights_of_folder(self.model, str(folder)) if folder.is_dir() else None
        if source is None:
            log.warning("%s has no average of its weights: run.ema begins there, with the weights.", checkpoint)
        for (name, weight), average in zip(self.model.named_parameters(), self.averages, strict=True):
            average.copy_(weight.detach() if source is None else source(name, weight.shape))
