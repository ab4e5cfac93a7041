"""When a run logs, evaluates and saves, where its stages end, and what a checkpoint between two log points remembers.

In: Trainer's events. Out: its control flags, and one line per stage in metrics.jsonl.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from transformers import TrainerCallback, set_seed

from clm.ddp import settle_buckets
from clm.document_mask import check_run
from clm.order import derive_key
from clm.preflight import run_preflight
from clm.schedule_free import begin_training

if TYPE_CHECKING:
    from clm.trainer import ClmTrainer


class PendingLoss(TypedDict):
    """The loss summed since the last log point, which is part of a checkpoint that lies between two log points."""

    since_step: int
    summed_loss: float


class RunFlow(TrainerCallback):
    """When to log, evaluate and save, where stock decides otherwise.

    On resume stock takes save_steps and logging_steps from the checkpoint; here the recipe's present values hold. The
    last step of a stage is always evaluated and saved: the next one begins from that checkpoint. The run's last step is
    also logged.
    """

    def __init__(self, pending_loss: PendingLoss | None, trainer: ClmTrainer):
        self.pending_loss = pending_loss
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)
        self._seed_dropout(args, state.global_step)
        begin_training(self.trainer.optimizer)
        settle_buckets(self.trainer)
        if self.pending_loss is not None:
            self.trainer.restore_pending_loss(self.pending_loss)
        if self.trainer.plan.document_mask is not None:
            check_run(self.trainer)
        self.trainer.saver.clean_up(state.global_step)  # run.retention may have changed
        if state.global_step == 0 and args.save_strategy != "no" and self.trainer.plan.recipe.run.preflight:
            run_preflight(self.trainer.saver, kwargs["model"])

    def _seed_dropout(self, args, step):
        """Give each process dropout masks of its own, and new ones where the checkpoint has no random state for it.

        Stock gives all processes the same masks, and on another number of processes those of step 0 once more. Where
        the checkpoint has a state for this process, stock loads it after this.
        """
        if step > 0 or args.process_index > 0:
            set_seed(derive_key(self.trainer.plan.seed, "dropout", step, args.process_index) % 2**32)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.saver.stop_if_full()
        if state.global_step < self.trainer.stage.last_step:
            return
        is_end = state.global_step >= state.max_steps
        control.should_log = control.should_log or is_end
        control.should_evaluate = args.eval_strategy != "no"
        control.should_save = args.save_strategy != "no" or not is_end
        if not is_end:
            self.trainer.outcome = "border"
            control.should_training_stop = True
        self.trainer.write_stage()
