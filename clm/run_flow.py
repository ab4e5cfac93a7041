"""When a run logs, evaluates and saves, and what a checkpoint between two log points remembers.

In: Trainer's events. Out: its control flags.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from transformers import TrainerCallback

if TYPE_CHECKING:
    from clm.trainer import ClmTrainer


class PendingLoss(TypedDict):
    """The loss summed since the last log point, which is part of a checkpoint that lies between two log points."""

    since_step: int
    summed_loss: float


class RunFlow(TrainerCallback):
    """When to log, evaluate and save, where stock decides otherwise.

    On resume stock takes save_steps and logging_steps from the checkpoint; here the recipe's present values hold. The
    last step is always logged, evaluated and saved.
    """

    def __init__(self, pending_loss: PendingLoss | None, trainer: ClmTrainer):
        self.pending_loss = pending_loss
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)
        if self.pending_loss is not None:
            self.trainer.restore_pending_loss(self.pending_loss)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = args.save_strategy != "no"
