"""Which micro-batches there are at one global batch, in which order they are tried, and which of them is taken.

In: a plan, and a function that measures one. Out: `Candidate`s with times.

    global batch 48 blocks, 1 process, present 8:  1 2 3 4 6 8 12 16 24 48
    8, 12, 16, 24: up while it gains; 48 runs out of memory; 6 and 4 only if nothing above 8 was faster
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from clm.plan import Plan
from clm.timeline import Stage

PATIENCE = 2  # candidates in a row that are not faster end the search in their direction
SAME = 0.01  # a difference of speed below this share is none: then the present or the smallest one is taken
APART = 1.4  # divisors that are no power of two are tried where they are so many times the one before


@dataclass(eq=False)
class Candidate:
    """A micro-batch and what was measured; `samples` are prepared blocks, `rows` what a recipe counts."""

    samples: int
    rows: int
    accumulation: int
    steps: list[float] = field(default_factory=list)  # seconds of a real step, one for each measured one
    peak_bytes: int = 0
    is_out_of_memory: bool = False

    @property
    def step_s(self) -> float:
        """The median; infinite where it does not fit or was not tried."""
        return statistics.median(self.steps) if self.steps else math.inf

    @property
    def spread(self) -> float:
        """Half of the width of the middle half of the steps, as a share of the median."""
        if len(self.steps) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.steps, n=4, method="inclusive")
        return (high - low) / 2 / self.step_s


def candidates(plan: Plan, stage: Stage) -> list[Candidate]:
    """Every micro-batch that divides the global batch of each stage, thinned out where they lie near to each other.

    With run.uneven_batch, where nothing has to divide: the powers of two. The present one is always among them.

    Args:
        stage: whose accumulation counts.
    """
    present, processes, stages = plan.samples_per_micro_batch, plan.num_processes, plan.timeline.stages
    if plan.recipe.run.uneven_batch:
        largest = min(math.ceil(each.samples_per_step / processes) for each in stages)
        values = {2**k for k in range(largest.bit_length())} | {present}
    else:
        shared = math.gcd(*(each.samples_per_step // processes for each in stages))
        values = {n for n in range(1, shared + 1) if shared % n == 0}
    kept: list[int] = []
    for value in sorted(values):
        is_power_of_two = value & (value - 1) == 0
        if is_power_of_two or value == present or value >= APART * kept[-1]:
            kept.append(value)
    rows = plan.prepared_block_size // plan.recipe.data.block_size
    return [Candidate(value, value * rows, math.ceil(stage.samples_per_step / (value * processes))) for value in kept]


def search(found: list[Candidate], start: int, measure: Callable[[Candidate], None]) -> None:
    """Measure upwards from the present one until nothing is gained or memory is out; where nothing was, downwards."""
    fastest = found[start]
    for direction in (found[start:], found[:start][::-1]):
        if fastest is not found[start]:  # upwards
            break
        idle = 0
        for candidate in direction:
            measure(candidate)
            if candidate.is_out_of_memory:
                if candidate.samples >= found[start].samples:
                    break
            elif candidate is found[start] or candidate.step_s < fastest.step_s * (1 - SAME):
                fastest, idle = candidate, 0
            else:
                idle += 1
            if idle == PATIENCE:
                break


def choose(tried: list[Candidate], now: Candidate) -> Candidate | None:
    """The present one where nothing is faster by more than steps differ among themselves, else the smallest that is as
    fast as the fastest; None: nothing fits."""
    fitting = [c for c in tried if c.steps]
    if not fitting:
        return None
    fastest = min(fitting, key=lambda c: c.step_s)
    if now.step_s <= fastest.step_s * (1 + max(SAME, now.spread, fastest.spread)):
        return now
    return min((c for c in fitting if c.step_s <= fastest.step_s * (1 + SAME)), key=lambda c: c.samples)
