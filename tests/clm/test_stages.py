"""Stages and mixtures in a recipe: shares from weights or amounts, one learning-rate function, clear refusals."""

import math
from fractions import Fraction

import pytest

from clm.plan_text import describe_plan, learning_rates
from clm.problems import RecipeError

SHORT = "{name: short, tokens: 5120, block_size: 16, tokens_per_step: 256}"
LONG = "{name: long, tokens: 5120}"


def staged(plan_of, *stages, more=()):
    return plan_of(
        "data.tokens=null", f"data.stages=[{', '.join(stages)}]", "training.per_device_train_batch_size=4", *more
    )


def test_stages_follow_each_other_in_steps_samples_and_tokens(plan_of):
    plan = staged(plan_of, SHORT, LONG)
    first, second = plan.timeline.stages
    assert (first.num_steps, first.samples_per_step, first.block_size) == (20, 4, 16)  # 5,120 / 256; 256 / 64
    assert (second.first_step, second.num_steps, second.samples_per_step, second.block_size) == (20, 10, 8, 32)
    assert (plan.accumulation(first), plan.accumulation(second)) == (2, 4)  # a micro-batch is 4 x 32 tokens in both
    assert plan.num_steps == 30 and plan.timeline.num_tokens == 10_240
    text = describe_plan(plan)
    assert "short: steps 1 to 20, 5,120 tokens" in text and "8 rows x 16 tokens x 1 processes x 2 accumulation" in text
    assert "long: steps 21 to 30" in text and "4 rows x 32 tokens x 1 processes x 4 accumulation" in text


def test_the_schedule_of_the_run_is_a_function_of_tokens(plan_of):
    cosine = ["training.lr_scheduler_type=cosine", "training.warmup_steps=0.1"]
    plain = plan_of(*cosine, "data.tokens=10_240", "training.per_device_train_batch_size=4")
    plan = staged(plan_of, SHORT, LONG, more=cosine)
    by_tokens = {k * 512: rate for k, rate in enumerate(learning_rates(plain, list(range(21))))}
    rates = learning_rates(plan, list(range(31)))
    for k, rate in enumerate(rates):
        tokens = plan.timeline.tokens_before(k)
        if tokens in by_tokens:
            assert rate == by_tokens[tokens]
    assert sum(plan.timeline.tokens_before(k) in by_tokens for k in range(31)) == 21


def test_a_stage_with_its_own_schedule_begins_where_the_one_before_ended(plan_of):
    plan = staged(
        plan_of,
        LONG,
        "{name: cool, tokens: 5120, schedule: {shape: 1-sqrt, end: 0.1}}",
        "{name: flat, tokens: 1024, schedule: {shape: constant}}",
        more=["training.lr_scheduler_type=constant_with_warmup", "training.warmup_steps=2"],
    )
    rates = learning_rates(plan, list(range(23)))
    assert rates[:3] == pytest.approx([0, 0.5e-3, 1e-3]) and rates[9:11] == pytest.approx([1e-3, 1e-3])
    assert rates[15] == pytest.approx(1e-3 * (1 - 0.9 * math.sqrt(0.5)))
    assert rates[20:] == pytest.approx([1e-4] * 3)


def test_schedules_of_all_stages_warm_up_and_meet(plan_of):
    plan = staged(
        plan_of,
        "{tokens: 5120, schedule: {shape: constant}}",
        "{tokens: 5120, schedule: {shape: linear, end: 0}}",
        more=["training.warmup_steps=4"],
    )
    assert learning_rates(plan, [0, 2, 4, 10, 15, 20]) == pytest.approx([0, 0.5e-3, 1e-3, 1e-3, 0.5e-3, 0])


def test_amounts_of_tokens_and_epochs_make_length_and_shares(plan_of, prepared):
    size = plan_of().splits[0].num_tokens
    plan = plan_of("data.tokens=null", f"data.mixture=[{{dataset: {prepared.folder}, epochs: 1.5}}]")
    assert plan.num_steps == math.ceil(1.5 * size / 512)
    plan = plan_of("data.tokens=null", f"data.mixture=[{{dataset: {prepared.folder}, tokens: 6K}}]")
    assert plan.num_steps == math.ceil(6000 / 512)
    assert plan.timeline.stages[0].shares == (Fraction(1),)


def test_the_passes_left_are_printed(plan_of):
    plan = plan_of()
    size = plan.splits[0].num_tokens
    assert f"left until pass 2 {(size - 10_240) / 1000:.3g} k, pass 3" in describe_plan(plan)


def test_a_run_that_passes_too_often_over_a_source_says_the_arithmetic(plan_of, prepared):
    with pytest.raises(RecipeError) as caught:
        staged(plan_of, "{name: a, tokens: 200K}", "{name: b, tokens: 100K}")
    text = str(caught.value)
    assert "asks for 200 k + 100 k tokens of" in text and "passes, but data.max_epochs is 4" in text


def test_rope_settings_of_a_stage_reach_its_model(plan_of):
    from clm.model import build_model

    plan = staged(plan_of, LONG, "{name: far, tokens: 512, rope: {rope_theta: 500000, max_position_embeddings: 256}}")
    section, stage = plan.recipe.model, plan.timeline.stages[1]
    far = build_model(section, plan.config, plan.tokenizer, "sdpa", 1, dict(stage.rope))
    near = build_model(section, plan.config, plan.tokenizer, "sdpa", 1, dict(plan.timeline.stages[0].rope))
    assert (far.config.rope_parameters["rope_theta"], far.config.max_position_embeddings) == (500000, 256)
    assert (near.config.rope_parameters["rope_theta"], near.config.max_position_embeddings) == (10000.0, 64)


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ([f"data.stages=[{LONG}]"], ["data.tokens is set together with data.stages"]),
        (["data.tokens=null"], ["data.tokens is missing"]),
        (["STAGES=[{name: a}]"], ["data.stages[0].tokens is missing"]),
        (["data.tokens=null", f"data.stages=[{LONG}, {LONG}]"], ["'long', which another stage has too"]),
        (["STAGES=[{tokens: 1K, lenght: 3}]"], ["data.stages[0].lenght is not a known key"]),
        (["STAGES=[{tokens: 1K, block_size: 48}]"], ["data.stages[0].block_size is 48", "64"]),
        (["STAGES=[{tokens: 1K, block_size: 16}]"], ["data.block_size is 32", "set it to 16"]),
        (["STAGES=[{tokens: 1K, tokens_per_step: 300}]"], ["Use 256 or 512"]),
        (
            ["STAGES=[{tokens: 1K, rope: {theta: 3}}]"],
            ["data.stages[0].rope.theta", "rope_theta"],
        ),
        (["STAGES=[{tokens: 1K, rope: {rope_type: yarn}}]"], ["which transformers refuses"]),
        (
            ["STAGES=[{tokens: 1K, schedule: {shape: cos, end: 0}}]"],
            ["shape is 'cos'", "cosine"],
        ),
        (["STAGES=[{tokens: 1K, schedule: {shape: linear}}]"], ["end is None", "from 0 to 1"]),
        (["STAGES=[{tokens: 1K, schedule: {shape: constant, end: 1}}]"], ["Remove end"]),
        (
            [
                "data.tokens=null",
                "data.stages=[{tokens: 1K, schedule: {shape: linear, end: 0}}]",
                "training.lr_scheduler_type=cosine",
            ],
            ["training.lr_scheduler_type is set but every stage has a schedule"],
        ),
        (["data.mixture=[{dataset: x, weight: 1, tokens: 3}]"], ["has weight and tokens"]),
        (["data.mixture=[{dataset: x}, {dataset: y, tokens: 3}]"], ["mixes weight with tokens or epochs"]),
        (["data.mixture=[{dataset: x, where: score>3}]"], ["bucket"]),
        (["run.retention={last: 0}"], ["run.retention.last is 0 and no weights are kept either"]),
        (["run.spikes={policy: ignore}"], ["run.spikes.policy is 'ignore', unknown"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(plan_of, overrides, expected):
    with pytest.raises(RecipeError) as caught:
        given = [o.replace("STAGES", "data.stages") for o in overrides]
        plan_of(*given, *(["data.tokens=null"] if given != overrides else []))
    for text in expected:
        assert text in str(caught.value)


def test_amounts_that_do_not_add_up_to_the_length_are_refused(plan_of, prepared):
    with pytest.raises(RecipeError, match="amounts of its mixture add up to 6,000 tokens"):
        plan_of(f"data.mixture=[{{dataset: {prepared.folder}, tokens: 6K}}]")
