"""The detector on numbers that a reader can check, on noise and on a real curve; and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clm.spike_detector import COLUMNS, MIN_HISTORY, NEW_LEVEL, Detector, Verdict
from clm.spike_report import describe_spike, split_episodes

BAD = COLUMNS.index("is_bad")


def judge(detector: Detector, loss: float, grad_norm: float = 1.0) -> dict[str, float]:
    """One step's verdict, by name."""
    return dict(zip(COLUMNS, detector.judge(torch.tensor([loss, grad_norm])).tolist(), strict=True))


def fed(losses: list[float], window: int = 5, threshold: float = 10.0) -> Detector:
    """A detector that has seen these losses."""
    detector = Detector(window, threshold)
    for loss in losses:
        judge(detector, loss)
    return detector


def bad_steps(values: list[tuple[float, float]], window: int = 128, threshold: float = 10.0) -> list[int]:
    """Which of the steps are bad, counted from 0."""
    detector = Detector(window, threshold)
    return [i for i, pair in enumerate(values) if detector.judge(torch.tensor(pair))[BAD]]


# --- by eye -----------------------------------------------------------------------------------------------------------


def test_deviations_are_counted_from_the_median_in_units_of_the_mad():
    verdict = judge(fed([3.0, 3.1, 2.9, 3.05, 2.95]), 4.0)  # median 3.00, distances 0 .1 .1 .05 .05: MAD 0.05
    assert verdict["median_loss"] == pytest.approx(3.0)
    assert verdict["z_loss"] == pytest.approx(1.0 / (1.4826 * 0.05), rel=1e-4)  # 13.5
    assert verdict["is_bad"] and verdict["num_before"] == 5


def test_the_gradient_norm_is_judged_by_its_logarithm():
    detector = Detector(4, 10.0)
    for norm in (0.5, 0.5, 0.5, 0.5):
        judge(detector, 3.0, norm)
    verdict = judge(detector, 3.0, 0.5 * math.exp(2.6))  # the floor is 0.25: 2.6 / 0.25 = 10.4
    assert verdict["z_grad_norm"] == pytest.approx(10.4, rel=1e-4)
    assert verdict["median_grad_norm"] == pytest.approx(0.5)
    assert verdict["is_bad"] and verdict["z_loss"] == 0


def test_a_loss_must_rise_by_a_tenth_however_quiet_the_steps_before_were():
    assert not judge(fed([3.0] * 5), 3.29)["is_bad"]
    assert judge(fed([3.0] * 5), 3.31)["is_bad"]  # floor 1 % of 3.0 is 0.03; 0.31 / 0.03 = 10.3


def test_a_fall_is_never_bad():
    assert not judge(fed([3.0] * 5), 0.01, 1e-6)["is_bad"]


@pytest.mark.parametrize("pair", [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf), (-math.inf, 1.0)])
def test_what_is_no_number_is_bad_from_the_first_step_on(pair):
    assert bad_steps([pair]) == [0]


def test_nothing_is_high_before_there_is_a_history():
    needed = MIN_HISTORY
    assert bad_steps([(3.0, 1.0)] * (needed - 1) + [(90.0, 1.0)]) == []
    assert bad_steps([(3.0, 1.0)] * needed + [(90.0, 1.0)]) == [needed]
    assert bad_steps([(3.0, 1.0)] * 4 + [(90.0, 1.0)], window=4) == [4], "a smaller window needs what it holds"


def test_bad_steps_do_not_enter_the_history_and_old_ones_leave_it():
    detector = fed([3.0] * 5)
    for _ in range(10):
        assert judge(detector, 9.0)["median_loss"] == 3.0
    for _ in range(3):
        judge(detector, 3.2)
    assert judge(detector, 3.0)["median_loss"] == pytest.approx(3.2)  # 3.0 3.0 3.2 3.2 3.2


def test_a_level_that_stays_is_the_new_normal():
    after = 5 + NEW_LEVEL
    bad = bad_steps([(3.0, 1.0)] * 5 + [(6.0, 1.0)] * 100 + [(12.0, 1.0)], window=5)
    assert bad == [*range(5, after), 105]


def test_bad_steps_that_follow_each_other_are_one_episode():
    def verdict(step: int) -> Verdict:
        return Verdict(step, 1e-3, 9.0, 1.0, 14.2, 0.0, 3.0, 1.0, 128, True)

    assert [[v.step for v in e] for e in split_episodes(map(verdict, [3, 4, 5, 9, 11, 12]))] == [
        [3, 4, 5],
        [9],
        [11, 12],
    ]


def test_the_line_says_what_is_high_and_against_what():
    bad = Verdict(1234, 1e-3, 9.31, 0.5, 14.2, 1.0, 3.02, 0.4, 128, True)
    assert describe_spike(bad, 10) == (
        "step 1,234: loss 9.31 is 14.2 robust deviations above the last 128 steps (median 3.02)"
    )
    assert describe_spike(bad._replace(z_grad_norm=11.0, z_loss=2.0), 10) == (
        "step 1,234: gradient norm 0.5 is 11.0 robust deviations above the last 128 steps (median 0.4)"
    )
    assert describe_spike(bad._replace(loss=math.nan), 10) == "step 1,234: the loss is nan"


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_before", [0, 3, 5, 12])
def test_a_restored_detector_judges_as_one_that_went_on(num_before):
    generator = torch.Generator().manual_seed(1)
    values = [(torch.tensor([3.0, 1.0]) + 0.3 * torch.rand(2, generator=generator)) for _ in range(40)]
    values[10] = torch.tensor([30.0, 1.0])
    straight = Detector(5, 10.0)
    for value in values[:num_before]:
        straight.judge(value)
    resumed = Detector(5, 10.0)
    resumed.restore(json.loads(json.dumps(straight.state())))
    for value in values[num_before:]:
        assert str(resumed.judge(value).tolist()) == str(straight.judge(value).tolist())  # nan is not equal to itself


def test_a_smaller_window_goes_on_with_the_newest_steps():
    detector = Detector(3, 10.0)
    detector.restore(fed([1.0, 2.0, 3.0, 4.0, 5.0]).state())
    assert detector.state()["loss"] == [3.0, 4.0, 5.0]


# --- noise ------------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    level=st.floats(0.5, 12.0),
    noise=st.floats(1e-4, 0.2),
    norm_noise=st.floats(1e-3, 0.6),
    fall=st.floats(0.0, 1.0),
)
def test_noise_and_a_falling_curve_are_no_spikes(seed, level, noise, norm_noise, fall):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(200, 2, generator=generator)
    trend = level * (1 - fall) + level * fall * torch.exp(-torch.arange(200) / 50)  # the fast fall of a start
    curve = torch.stack([trend + level * noise * normal[:, 0], torch.exp(norm_noise * normal[:, 1])], dim=1)
    assert bad_steps([tuple(pair) for pair in curve.tolist()]) == []


def test_false_alarms_are_rare_even_in_noise_with_heavy_tails():
    # Student's t with 5 degrees of freedom throws beyond 10 deviations once in some thousands of steps. docs/spikes.md
    # has the rates of longer streams.
    generator = torch.Generator().manual_seed(0)
    chi = torch.randn(3000, 5, generator=generator).square().mean(1).sqrt()
    loss = 3 + 0.05 * torch.randn(3000, generator=generator) / chi
    assert len(bad_steps([(x, 1.0) for x in loss.tolist()])) <= 2


def test_the_recorded_curve_of_the_demo_has_no_spike():
    # loss and gradient norm of each step of recipes/demo.yaml (its batch is 1,024 tokens, so it is noisy), with one
    # gradient norm of 12 among norms of 1; recorded with training.logging_steps=1
    curve = json.loads((Path(__file__).parent / "demo_curve.json").read_text())
    assert len(curve) == 1280
    for window in (32, 128):
        assert bad_steps(curve, window=window) == []


# --- the device -------------------------------------------------------------------------------------------------------


def test_judging_never_waits_for_a_value():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            # reading a number, or a shape that depends on numbers, makes the host wait for a GPU
            self.reads += "_local_scalar_dense" in str(function) or "nonzero" in str(function)
            return function(*args, **(kwargs or {}))

    detector = Detector(8, 10.0)
    with Counter() as counter:
        for value in (3.0, 3.1, 3.0, 9.0):
            detector.judge(torch.full((2,), value))
        assert counter.reads == 0
        detector.count.item()
        assert counter.reads == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_judging_and_the_gate_never_wait():
    detector = Detector(8, 10.0, "cuda")
    weight = torch.ones(4, device="cuda", requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    losses = [torch.full((2,), value, device="cuda") for value in (3.0,) * 8 + (9.0,)]
    weight.grad = torch.ones_like(weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for loss in losses:
            before = weight.detach().clone()
            optimizer.found_inf = detector.judge(loss)[BAD].clone()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(weight, before), "the last one is a spike"
