"""Which samples does step N train on? The run's stages laid out in steps, samples and tokens.

In: the stages (length in tokens, global batch, row length, shares of the datasets) and the excluded samples.
Out: `Timeline`: stage, samples and tokens of any step, and the stages as the order needs them.

    stage 0: 3 steps of 4 samples      stage 1: 2 steps of 8 samples      excluded: samples [4, 8), once step 2
    step     1       2        3        4         5
    samples  0..3    8..11    12..15   16..23    24..31

Steps are counted from 1, as metrics.jsonl and checkpoints count them: step N made `checkpoint-N`. A sample is one
prepared block. Excluded samples keep their numbers and are passed over, so the number of steps does not change.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from clm.order import OrderStage

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Schedule:
    """A stage's own piece of the learning-rate curve: from where the stage before it ended to `end` x the peak."""

    shape: str  # constant, linear, cosine or 1-sqrt
    end: float | None = None  # None for constant, which stays where it begins


@dataclass(frozen=True)
class Stage:
    """A part of the run in which mixture, row length, global batch and RoPE stay the same.

    Its steps are first_step + 1 ... first_step + num_steps.
    """

    index: int
    name: str
    first_step: int
    num_steps: int
    block_size: int  # T, tokens of a row
    tokens_per_step: int
    samples_per_step: int  # prepared blocks of a global batch
    shares: tuple[Fraction, ...]  # of each dataset of the run, by tokens; 0: not in this stage
    schedule: Schedule | None = None
    rope: tuple[tuple[str, object], ...] = ()

    @property
    def last_step(self) -> int:
        """The step that ends the stage."""
        return self.first_step + self.num_steps

    @property
    def num_tokens(self) -> int:
        """Tokens that the stage trains on."""
        return self.num_steps * self.tokens_per_step


class Timeline:
    """All stages of a run.

    Args:
        stages: in order, without gaps.
        excluded: sorted (first, end) sample ranges, whole global batches, that rollbacks took out.
    """

    def __init__(self, stages: list[Stage], excluded: Ranges = ()):
        assert stages and [s.first_step for s in stages] == [0, *(s.last_step for s in stages[:-1])]
        self.stages = stages
        self.excluded = excluded
        self._first_samples = []
        first, left = 0, list(excluded)
        for stage in stages:
            self._first_samples.append(first)
            end = first + stage.num_steps * stage.samples_per_step
            while left and left[0][0] < end:  # an excluded batch makes its stage longer in samples, not in steps
                end += left[0][1] - left[0][0]
                left.pop(0)
            first = end
        self.num_samples = first  # excluded ones included

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages[-1].last_step

    @property
    def num_tokens(self) -> int:
        """Tokens that the whole run trains on."""
        return self.tokens_before(self.num_steps)

    def stage_of_step(self, step: int) -> Stage:
        """The stage that trains step `step`, in [1, num_steps]."""
        assert 1 <= step <= self.num_steps, step
        return self.stages[bisect_right([s.first_step for s in self.stages], step - 1) - 1]

    def tokens_before(self, num_steps: int) -> int:
        """Tokens trained on in the first `num_steps` steps."""
        return sum(max(0, min(num_steps - s.first_step, s.num_steps)) * s.tokens_per_step for s in self.stages)

    def samples_of_step(self, step: int) -> np.ndarray:
        """The samples of a step's global batch, in its order: int64 (samples_per_step,)."""
        stage = self.stage_of_step(step)
        sample = self._first_samples[stage.index] + (step - 1 - stage.first_step) * stage.samples_per_step
        for first, end in self._excluded_in(stage):
            if first > sample:
                break
            sample += end - first
        return np.arange(sample, sample + stage.samples_per_step)

    def step_of_sample(self, sample: int) -> int | None:
        """The step that trains on a sample; None for an excluded one and past the end of the run."""
        if not 0 <= sample < self.num_samples or any(first <= sample < end for first, end in self.excluded):
            return None
        stage = self.stages[bisect_right(self._first_samples, sample) - 1]
        passed_over = sum(end - first for first, end in self._excluded_in(stage) if first < sample)
        within = sample - self._first_samples[stage.index] - passed_over
        return stage.first_step + within // stage.samples_per_step + 1

    def samples_before(self, num_steps: int) -> int:
        """The first sample that is not yet dealt with after `num_steps` steps: what passes are counted to."""
        return int(self.samples_of_step(num_steps)[-1]) + 1 if num_steps else 0

    def order_stages(self) -> list[OrderStage]:
        """The stages as the order needs them; the last one has no end, so that a longer run begins like this one."""
        ends = [*self._first_samples[1:], None]
        lengths = [None if e is None else e - f for f, e in zip(self._first_samples, ends, strict=True)]
        return [OrderStage(n, stage.shares) for n, stage in zip(lengths, self.stages, strict=True)]

    def _excluded_in(self, stage: Stage) -> list[tuple[int, int]]:
        first = self._first_samples[stage.index]
        is_last = stage.index + 1 == len(self.stages)
        end = self.num_samples if is_last else self._first_samples[stage.index + 1]
        return [r for r in self.excluded if first <= r[0] < end]
