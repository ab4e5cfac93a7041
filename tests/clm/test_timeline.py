"""Steps, samples and tokens of a run with stages and exclusions, by numbers a person can add up."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clm.order import Order, OrderSource
from clm.timeline import Stage, Timeline


def timeline(*stages: tuple[int, int], excluded: tuple[tuple[int, int], ...] = ()) -> Timeline:
    """Stages of (steps, samples per step); a sample has 10 tokens."""
    made, first = [], 0
    for index, (num_steps, size) in enumerate(stages):
        made.append(Stage(index, f"s{index}", first, num_steps, 10, size * 10, size, (Fraction(1),)))
        first += num_steps
    return Timeline(made, excluded)


def test_the_example_of_the_module():
    run = timeline((3, 4), (2, 8), excluded=((4, 8),))
    firsts = [(int(s[0]), int(s[-1])) for s in map(run.samples_of_step, range(1, 6))]
    assert firsts == [(0, 3), (8, 11), (12, 15), (16, 23), (24, 31)]
    assert [run.step_of_sample(s) for s in (3, 4, 7, 8, 15, 16, 31, 32)] == [1, None, None, 2, 3, 4, 5, None]
    assert [run.stage_of_step(s).index for s in range(1, 6)] == [0, 0, 0, 1, 1]
    assert [run.tokens_before(k) for k in range(6)] == [0, 40, 80, 120, 200, 280]
    assert (run.num_steps, run.num_samples, run.num_tokens) == (5, 32, 280)


def test_an_excluded_batch_is_passed_over_and_everything_before_it_stays():
    before, after = timeline((6, 4)), timeline((6, 4), excluded=((8, 12), (12, 16)))
    for step in (1, 2):
        assert before.samples_of_step(step).tolist() == after.samples_of_step(step).tolist()
    assert after.samples_of_step(3).tolist() == [16, 17, 18, 19]
    assert after.num_steps == 6 and after.num_samples == 32


@settings(max_examples=200, deadline=None)
@given(
    stages=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=4),
    bad=st.lists(st.integers(1, 30), max_size=6),
)
def test_every_sample_is_trained_on_once_or_excluded(stages, bad):
    excluded: list[tuple[int, int]] = []
    for step in bad:  # as rollbacks do: one after the other, each on the timeline of its time
        now = timeline(*stages, excluded=tuple(sorted(excluded)))
        samples = now.samples_of_step(min(step, now.num_steps))
        if any(first > samples[0] for first, _ in excluded):
            continue  # a rollback never goes back past an earlier one
        excluded.append((int(samples[0]), int(samples[-1]) + 1))
    run = timeline(*stages, excluded=tuple(sorted(excluded)))
    seen = [s for step in range(1, run.num_steps + 1) for s in run.samples_of_step(step).tolist()]
    out = [s for first, end in excluded for s in range(first, end)]
    assert sorted(seen + out) == list(range(run.num_samples))
    assert seen == sorted(seen)
    for step in range(1, run.num_steps + 1):
        assert {run.step_of_sample(s) for s in run.samples_of_step(step).tolist()} == {step}
    assert sum(s.num_samples or 0 for s in run.order_stages()[:-1]) <= run.num_samples


def test_a_later_end_does_not_change_what_came_before():
    short, long = timeline((3, 4), (2, 8)), timeline((3, 4), (9, 8))
    orders = [Order([OrderSource(50)], t.order_stages(), 1) for t in (short, long)]
    blocks = [o.block_at(range(28))[1].tolist() for o in orders]
    assert blocks[0] == blocks[1]


def test_a_step_outside_the_run_is_a_mistake_of_the_caller():
    with pytest.raises(AssertionError):
        timeline((3, 4)).samples_of_step(4)
