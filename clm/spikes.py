"""Loss spikes: seen on the device, read at log points, and logged, reported, skipped or rolled back.

In: the loss of each micro-batch, the gradient norm and the learning rate of each step. Out, by `run.spikes.policy`:

    log        one line, one event                       the host judges, at the log point
    report     and the folder spikes/step-<N>/
    skip       and the update is not made                the device judges, before the update
    rollback   back to the checkpoint before the spike, without the samples of its steps

Between two log points nothing waits for the device: the numbers lie in a buffer there. All processes judge the same
reduced numbers, so they decide the same.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from clm.arguments import DEFAULTS
from clm.divided import is_deepspeed_used, is_divided
from clm.events import append_event, read_events
from clm.metrics import log
from clm.run_folder import list_checkpoints
from clm.spike_detector import COLUMNS, NEW_LEVEL, Detector, Verdict
from clm.spike_report import describe_spike, is_number, split_episodes, write_report

if TYPE_CHECKING:
    from clm.recipe import Recipe
    from clm.trainer import ClmTrainer

RING = 512  # steps that the buffer on the device holds; with fewer log points than that it is read when it is full


def check_policy(recipe: Recipe, training: dict[str, Any], precision: str) -> None:
    """Refuse `skip` where the update cannot be gated on the device; problems go to recipe.problems."""
    if recipe.run.spikes.policy != "skip":
        return
    remedy = "rollback and report work with everything."
    optim = training.get("optim", DEFAULTS["optim"])
    if is_deepspeed_used(training):
        why = f"DeepSpeed makes the update, which has no gate. Start without DeepSpeed, or choose another: {remedy}"
    elif recipe.run.optimizer == "muon":
        why = f"run.optimizer is muon, which has no gate on the device. Choose another: {remedy}"
    elif is_divided():
        why = f"under FSDP2 and tensor parallelism the update has no gate. Use DDP, or choose another: {remedy}"
    elif optim != "adamw_torch_fused":
        why = f"training.optim is {optim}, which has no gate on the device. Use adamw_torch_fused, or another: {remedy}"
    elif precision == "fp16":
        why = f"the precision is fp16, whose loss scaling uses the same gate. Use bf16, or choose another: {remedy}"
    else:
        return
    recipe.problems.add("run.spikes.policy", f"is skip but {why}")


class SpikeWatch(TrainerCallback):
    """Watches every step.

    Args:
        trainer: whose run is watched.
        device: where losses are.
    """

    def __init__(self, trainer: ClmTrainer, device: torch.device):
        self.trainer, self.plan = trainer, trainer.plan
        self.settings = settings = self.plan.recipe.run.spikes
        is_rollback_off = settings.policy == "rollback" and settings.max_rollbacks == 0
        self.policy = "report" if is_rollback_off else settings.policy
        self.is_gated = self.policy == "skip"
        self.detector = Detector(settings.window, settings.threshold, device if self.is_gated else "cpu")
        # a row per step since the last look: loss and gradient norm, or the whole verdict where the device judges
        self.ring = torch.zeros(RING, len(COLUMNS) if self.is_gated else 2, device=device)
        self.rates: list[float] = []  # learning rates of those steps
        self.loss = torch.zeros((), device=device)  # of the step in the making
        self.grad_norm: torch.Tensor | float | None = None
        self.summed_before: torch.Tensor | None = None
        self.unread: list[Verdict] = []  # judged, but nothing was done about them yet
        self.recent: deque[Verdict] = deque(maxlen=settings.window)
        self.burst: list[Verdict] = []  # bad steps that may go on; the rollback, and a save, wait for their end
        self.is_save_due = False
        self.last_bad_step = 0
        self.bad_since_log: list[int] = []
        self.num_broken_since_log = 0
        self.num_broken_in_a_row = 0
        self.steps_since_log = 0
        self.report: Path | None = None  # the newest one's folder
        self.fatal: str | None = None  # why training must end at this log point

    # --- every step: no look at a value, no waiting -----------------------------------------------------------------

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's loss, scaled as Trainer sums it."""
        self.loss += loss

    def on_step_begin(self, args, state, control, **kwargs):
        if self.is_gated:
            self.summed_before = self.trainer._tr_loss.clone()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        row = self.ring[len(self.rates)]
        row[0].copy_(self.loss)
        self.loss.zero_()
        row[1] = 0.0 if self.grad_norm is None else self.grad_norm  # ZeRO stage 0 knows none
        if self.plan.precision == "fp16":  # an overflow is the loss scaler's affair: it drops the update itself
            row[1].copy_(torch.where(torch.isfinite(row[1]), row[1], 0.0))
        self.rates.append(self.trainer._get_learning_rate())
        if self.is_gated:
            self._gate(row, state.global_step + 1)

    def _gate(self, row: torch.Tensor, step: int) -> None:
        """Judge the step on the device, and let the optimizer move neither weights, moments nor counters if it is bad.

        Source: torch/optim/adam.py, _fused_adam: `found_inf` is the gate that mixed precision uses.
        """
        if self.trainer.args.world_size > 1:
            dist.all_reduce(row[:2])
            row[:2] /= self.trainer.args.world_size
        self._begin_stage(step)
        row.copy_(self.detector.judge(row[:2].clone()))
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)  # below accelerate's wrapper
        optimizer.found_inf = row[-1].clone()
        # one NaN in the sum that Trainer logs would stay in it: such a loss is left out
        summed = self.trainer._tr_loss
        summed.copy_(torch.where(torch.isfinite(row[0]), summed, self.summed_before))

    def _begin_stage(self, step: int) -> None:
        """Another stage has other data or another batch: its level is no spike."""
        stage = self.plan.timeline.stage_of_step(step)
        if stage.index > 0 and step == stage.first_step + 1:
            self.detector.clear()

    # --- log points -------------------------------------------------------------------------------------------------

    def on_step_end(self, args, state, control, **kwargs):
        is_point = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if not is_point and len(self.rates) < RING:
            return
        self._read()
        verdicts, self.unread = self.unread, []
        self.recent.extend(verdicts)
        bad = [v for v in verdicts if v.is_bad]
        if not self.is_gated:  # after a loss that is no number every later one is none either, whatever its data
            first_broken = next((i for i, v in enumerate(bad) if not is_number(v)), len(bad))
            bad = bad[: first_broken + 1]
        self.steps_since_log = state.global_step - self.trainer._globalstep_last_logged
        self.bad_since_log += [v.step for v in bad]
        self.num_broken_since_log += sum(not is_number(v) for v in bad)
        if self.policy == "rollback":
            self._roll_back_if_over(state, control, bad, verdicts)
            return
        for episode in split_episodes(bad):
            self._tell(episode)
        self._stop_if_broken(control, bad, verdicts)

    def _read(self) -> None:
        """Fetch and judge the steps since the last look: one collective and one copy for all of them."""
        num_steps = len(self.rates)
        if not num_steps:
            return
        rows = self.ring[:num_steps]
        if not self.is_gated and self.trainer.args.world_size > 1:
            dist.all_reduce(rows)
            rows /= self.trainer.args.world_size
        first = self.trainer.state.global_step - num_steps + 1
        for step, rate, row in zip(range(first, first + num_steps), self.rates, rows.cpu(), strict=True):
            if not self.is_gated:
                self._begin_stage(step)
                row = self.detector.judge(row)
            *numbers, num_before, is_bad = row.tolist()
            self.unread.append(Verdict(step, rate, *numbers, int(num_before), bool(is_bad)))
        self.rates = []

    def _tell(self, episode: list[Verdict], ending: str = "") -> None:
        """One line and one event for steps that were bad in a row; a report for the first of them."""
        first, last = episode[0], episode[-1]
        goes_on = self.last_bad_step + 1 == first.step
        self.last_bad_step = last.step
        if not self.trainer.is_world_process_zero():
            return
        reason = describe_spike(first, self.settings.threshold)
        sentence = reason
        if last.step > first.step:
            sentence += f"; {len(episode)} bad steps up to step {last.step:,}"
        if self.is_gated:
            sentence += "; the update is skipped" if len(episode) == 1 else "; their updates are skipped"
        folder = None
        if self.policy != "log" and not goes_on:
            folder, where = write_report(self.plan, episode, self.recent, reason)
            self.report = folder
            sentence += f"; {where}"
        log.warning("%s%s", sentence, ending)
        steps = {"step": first.step, "last_step": last.step, "is_skipped": self.is_gated}
        report = None if folder is None else str(folder.relative_to(self.plan.run_folder))
        append_event(self.plan.run_folder, {"event": "spike", **steps, "reason": reason, "report": report})

    def _stop_if_broken(self, control: Any, bad: list[Verdict], verdicts: list[Verdict]) -> None:
        """End the training at this log point where its weights are lost, and do not save them."""
        broken = [v for v in bad if not is_number(v)]
        if self.is_gated:
            for verdict in verdicts:
                self.num_broken_in_a_row = 0 if is_number(verdict) else self.num_broken_in_a_row + 1
            if self.num_broken_in_a_row < NEW_LEVEL:
                return  # a step that was skipped did no harm
        if not broken:
            return
        run, reason = self.plan.run_folder, describe_spike(broken[0], self.settings.threshold)
        what = reason.partition(": ")[2]
        text = f"{run}: {what} at step {broken[0].step:,}. "
        if self.is_gated:
            text += f"So were {NEW_LEVEL} steps in a row, although their updates were skipped: it is not the data. "
        else:
            text += "Training on would save broken weights. "
        if self.report is not None:
            text += f"Its batch is shown in {self.report}. "
        text += "Lower training.learning_rate or lengthen training.warmup_steps, and give the run another "
        text += "training.run_name; checkpoints up to here are kept."
        if self.policy in ("log", "report"):
            text += " If it is the data, run.spikes.policy=rollback goes on from the newest one without this batch."
        self.fatal = text
        control.should_log, control.should_save, control.should_evaluate = True, False, False

    def complete_logs(self, logs: dict[str, Any]) -> dict[str, Any]:
        """What a training log point adds: the number of bad steps since the last one, and which were skipped.

        Changes `logs` in place: the number, for every logger, and a mean loss over those steps that have one.

        Returns:
            What only metrics.jsonl can hold.
        """
        bad, num_broken = self.bad_since_log, self.num_broken_since_log
        self.bad_since_log, self.num_broken_since_log = [], 0
        if not bad:
            return {}
        logs["spikes"] = len(bad)
        if not self.is_gated:
            return {}
        num_counted = self.steps_since_log - num_broken
        logs["loss"] = logs["loss"] * self.steps_since_log / num_counted if num_counted else float("nan")
        return {"skipped_steps": bad}

    # --- rollback ---------------------------------------------------------------------------------------------------

    def _roll_back_if_over(self, state: Any, control: Any, bad: list[Verdict], verdicts: list[Verdict]) -> None:
        """Decide when the burst is over, so that all of its samples are known; a save waits for that."""
        self.burst += bad
        if not self.burst:
            return
        is_over = not verdicts[-1].is_bad or not all(map(is_number, self.burst)) or len(self.burst) >= NEW_LEVEL
        if not (is_over or control.should_training_stop or state.global_step >= state.max_steps):
            self.is_save_due = self.is_save_due or control.should_save
            control.should_save = False
            return
        burst, self.burst = self.burst, []
        refusal = self._ask_rank_0(burst[0].step)
        if refusal is not None:
            for episode in split_episodes(burst):
                self._tell(episode, f". No rollback: {refusal}")
            control.should_save, self.is_save_due = control.should_save or self.is_save_due, False
            self._stop_if_broken(control, burst, verdicts)
            return
        self.trainer.saver.wait()  # the checkpoint in the making is one to go back to
        for episode in split_episodes(burst):
            self._tell(episode)  # before the event, after which the step has other samples
        if self.trainer.is_world_process_zero():
            self._write_rollback(burst, is_over)
        self.trainer.outcome = "rollback"  # a request to stop is still there, and followed after it
        control.should_training_stop, control.should_save, control.should_evaluate = True, False, False

    def _ask_rank_0(self, step: int) -> str | None:
        """Why the run must not go back from this step, or None; rank 0's events.jsonl is the one that counts."""
        answer: list[str | None] = [None]
        if self.trainer.is_world_process_zero():
            before = [event for event in read_events(self.plan.run_folder) if event["event"] == "rollback"]
            if len(before) >= self.settings.max_rollbacks:
                answer = [f"run.spikes.max_rollbacks is {self.settings.max_rollbacks}"]
            elif any(event["step"] >= step and event.get("is_over", True) for event in before):
                answer = [f"the run went back from step {max(e['step'] for e in before):,} before. It is not the data"]
        if self.trainer.args.world_size > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(answer)
        return answer[0]

    def _write_rollback(self, burst: list[Verdict], is_over: bool) -> None:
        """The one durable line that makes the rollback: from here on every start applies it."""
        timeline, run = self.plan.timeline, self.plan.run_folder
        # samples of a later stage would change their meaning when this one takes a batch more
        stage = timeline.stage_of_step(burst[0].step)
        steps = [v.step for v in burst if v.step <= stage.last_step]
        batches = [timeline.samples_of_step(step) for step in steps]
        to_step = max((step for step, _ in list_checkpoints(run) if step < steps[0]), default=0)
        append_event(
            run,
            {
                "event": "rollback",
                "step": steps[0],
                "last_step": steps[-1],
                "to_step": to_step,
                "excluded": [[int(batch[0]), int(batch[-1]) + 1] for batch in batches],
                "num_tokens": len(steps) * stage.tokens_per_step,
                "is_over": is_over,
                "reason": describe_spike(burst[0], self.settings.threshold),
            },
        )
        log.warning(
            "going back to step %s; the batches of %s bad steps are left out from now on", f"{to_step:,}", len(steps)
        )

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint remembers, so that a resumed run judges as an uninterrupted one. Called on all ranks."""
        self._read()
        return {
            **self.detector.state(),
            "last_bad_step": self.last_bad_step,
            "bad_since_log": self.bad_since_log,
            "num_broken_since_log": self.num_broken_since_log,
            "num_broken_in_a_row": self.num_broken_in_a_row,
        }

    def start(self, state: dict[str, Any] | None) -> None:
        """Watch from now on, as the `state` of the resumed checkpoint says.

        To be called after all other callbacks were added: this one takes a save back when the run goes back.
        """
        self.trainer.add_callback(self)
        if state is None:
            return
        self.detector.restore(state)
        self.last_bad_step = state["last_bad_step"]
        self.bad_since_log = list(state["bad_since_log"])
        self.num_broken_since_log = state["num_broken_since_log"]
        self.num_broken_in_a_row = state["num_broken_in_a_row"]
