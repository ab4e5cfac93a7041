"""Learning rates by their formulas: at the start, the end of the warm-up, the middle and the last step, in any unit."""

from __future__ import annotations

import math

import pytest

from clm.plan_text import learning_rates
from clm.problems import RecipeError

STEPS, WARMUP, DECAY, PEAK, FLOOR = 100, 10, 20, 1e-3, 0.1  # steps of 512 tokens


def cosine(k):
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (k - WARMUP) / (STEPS - WARMUP)))


def decayed(curve):
    """Warm-up from the floor, stable, then down to the floor over the last 20 steps by `curve` (1 to 0)."""

    def factor(k):
        if k < WARMUP:
            return FLOOR + (1 - FLOOR) * k / WARMUP
        begin = STEPS - DECAY
        return 1.0 if k < begin else FLOOR + (1 - FLOOR) * curve((k - begin) / DECAY)

    return factor


def warmed(after):
    return lambda k: k / WARMUP if k < WARMUP else after(k)


WSD = ["training.lr_scheduler_type=warmup_stable_decay"]
SHAPES = {
    "cosine with floor": (
        ["training.lr_scheduler_type=cosine_with_min_lr", "training.lr_scheduler_kwargs.min_lr_rate=0.1"],
        warmed(cosine),
    ),
    "linear": (["training.lr_scheduler_type=linear"], warmed(lambda k: (STEPS - k) / (STEPS - WARMUP))),
    "cosine": (["training.lr_scheduler_type=cosine"], warmed(lambda k: (cosine(k) - FLOOR) / (1 - FLOOR))),
    "constant": (["training.lr_scheduler_type=constant_with_warmup"], warmed(lambda k: 1.0)),
    "constant, no warm-up": (["training.lr_scheduler_type=constant"], lambda k: 1.0),
    "inverse square root": (
        ["training.lr_scheduler_type=inverse_sqrt"],
        warmed(lambda k: math.sqrt(WARMUP / k)),
    ),
    "WSD, 1 - sqrt": (
        [*WSD, "training.lr_scheduler_kwargs={decay_type: 1-sqrt, min_lr_ratio: 0.1, num_decay_steps: 20}"],
        decayed(lambda u: 1 - math.sqrt(u)),
    ),
    "WSD, linear": (
        [*WSD, "training.lr_scheduler_kwargs={decay_type: linear, min_lr_ratio: 0.1, num_decay_steps: 20}"],
        decayed(lambda u: 1 - u),
    ),
}
UNITS = {
    "steps": ["training.warmup_steps=10"],
    "share": ["training.warmup_steps=0.1"],
    "tokens": ["run.warmup_tokens=5_120"],
    "none": ["training.warmup_steps=0"],
}
MARKS = [0, 1, WARMUP - 1, WARMUP, STEPS // 2, STEPS - DECAY, STEPS - DECAY // 2, STEPS - 1]


@pytest.mark.parametrize(
    "shape, unit",
    [
        *((shape, "none" if shape == "constant, no warm-up" else "steps") for shape in SHAPES),
        ("linear", "share"),
        ("cosine with floor", "tokens"),
    ],
)
def test_rates_are_those_of_the_formula(plan_of, shape, unit):
    overrides, formula = SHAPES[shape]
    plan = plan_of(*overrides, *UNITS[unit], "data.tokens=51_200")
    assert plan.num_steps == STEPS
    assert learning_rates(plan, MARKS) == pytest.approx([PEAK * formula(k) for k in MARKS], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("decay", ["run.decay_tokens=10_240", "training.lr_scheduler_kwargs.num_decay_steps=0.2"])
def test_the_decay_is_said_in_tokens_or_as_a_share(plan_of, decay):
    kwargs = ["training.lr_scheduler_kwargs={decay_type: 1-sqrt, min_lr_ratio: 0.1}", decay]
    plan = plan_of(*WSD, *kwargs, "run.warmup_tokens=5_120", "data.tokens=51_200")
    formula = SHAPES["WSD, 1 - sqrt"][1]
    assert learning_rates(plan, MARKS) == pytest.approx([PEAK * formula(k) for k in MARKS], rel=1e-9)


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["run.warmup_tokens=1K", "training.warmup_steps=2"], "run.warmup_tokens is set together with"),
        (
            ["training.lr_scheduler_type=constant", "training.warmup_steps=10"],
            "training.warmup_steps is set but training.lr_scheduler_type is constant, which has no warm-up",
        ),
        (
            ["training.lr_scheduler_type=constant", "run.warmup_tokens=1K"],
            "run.warmup_tokens is set but training.lr_scheduler_type is constant",
        ),
        (["run.decay_tokens=1K"], "run.decay_tokens is set but only training.lr_scheduler_type: warmup_stable_decay"),
        (
            [*WSD, "run.decay_tokens=1K", "training.lr_scheduler_kwargs.num_decay_steps=3"],
            "run.decay_tokens is set together with training.lr_scheduler_kwargs.num_decay_steps",
        ),
    ],
)
def test_what_would_have_no_effect_and_two_answers_are_refused(plan_of, overrides, text):
    with pytest.raises(RecipeError, match=text):
        plan_of(*overrides)
