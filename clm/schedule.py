"""The learning rate as one function of the step over the whole run, stages included.

In: the checked training section, the timeline. Out: `learning_rate_factor(...)`: step index -> share of the peak.

Without stages it is the schedule of transformers, number by number. With stages the run's schedule is a function of
tokens: it is read at tokens trained / data.tokens_per_step, so a larger global batch does not stretch it. A stage with
a `schedule` of its own leaves that curve and goes from wherever the stage before it ended to its `end`, in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from clm.arguments import scheduler_kwargs
from clm.timeline import Schedule, Timeline


def learning_rate_factor(
    training: dict[str, Any], timeline: Timeline, tokens_per_step: int, schedule_tokens: int | None
) -> Callable[[int], float]:
    """The factor on the peak learning rate that the optimizer step after `k` finished steps uses.

    Args:
        training: checked values of the training section.
        timeline: the run's stages.
        tokens_per_step: data.tokens_per_step, the global batch in which the section's steps are counted.
        schedule_tokens: the run's schedule spans so many tokens; None: the whole run.
    """
    horizon = math.ceil((schedule_tokens or timeline.num_tokens) / tokens_per_step)
    warmup = num_warmup_steps(training, horizon)
    run_curve = _run_schedule(training, warmup, horizon)

    def run_factor(num_tokens: int) -> float:
        steps, rest = divmod(num_tokens, tokens_per_step)
        return run_curve(steps if rest == 0 else num_tokens / tokens_per_step)

    ends: list[float] = []  # the factor at the end of each stage

    def factor_in(index: int, num_tokens: int) -> float:
        stage = timeline.stages[index]
        if stage.schedule is None:
            return run_factor(num_tokens)
        before = timeline.tokens_before(stage.first_step)
        start = ends[index - 1] if index else 1.0
        warm = min(1.0, num_tokens / tokens_per_step / warmup) if warmup else 1.0
        return warm * _piece(stage.schedule, start, (num_tokens - before) / stage.num_tokens)

    for stage in timeline.stages:
        ends.append(factor_in(stage.index, timeline.tokens_before(stage.last_step)))

    def factor(num_steps: int) -> float:
        step = min(num_steps + 1, timeline.num_steps)  # after the last step the scheduler is asked once more
        return factor_in(timeline.stage_of_step(step).index, timeline.tokens_before(num_steps))

    return factor


def num_warmup_steps(training: dict[str, Any], horizon: int) -> int:
    """training.warmup_steps as a number of steps, where below 1 it is a share of the schedule's `horizon`."""
    warmup = training.get("warmup_steps", 0) or 0
    return int(warmup) if warmup >= 1 else math.ceil(horizon * warmup)


def _run_schedule(training: dict[str, Any], warmup: int, horizon: int) -> Callable[[float], float]:
    """The function that transformers' scheduler of this name multiplies the peak with."""
    import torch
    from transformers import get_scheduler

    scheduler = get_scheduler(
        training.get("lr_scheduler_type", "linear"),
        optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training["learning_rate"]),
        num_warmup_steps=warmup,
        num_training_steps=horizon,
        scheduler_specific_kwargs=scheduler_kwargs(training, horizon),
    )
    return scheduler.lr_lambdas[0]


def _piece(schedule: Schedule, start: float, u: float) -> float:
    """The factor at the share `u` of a stage, from `start` at 0 to `schedule.end` at 1; constant stays at `start`."""
    if schedule.end is None:
        return start
    span = {
        "linear": u,
        "cosine": 0.5 * (1 - math.cos(math.pi * u)),
        "1-sqrt": math.sqrt(u),  # Haegele et al., "Scaling Laws and Compute-Optimal Training ...", 2024, section 3
    }[schedule.shape]
    return start + (schedule.end - start) * span
