"""SIGKILL at random moments: nothing incomplete is ever picked, nothing complete is lost, the end is the same.

    KILL_SEED=7 KILLS=20 pytest -m slow tests/kill/test_random_kills.py

Half of the kills come after a random time, half at a random file operation, which is where the fragile moments are:
during saves, rotation, and the writing of logs and of final/.
"""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from .lab import Fault, Lab, assert_same_run, last_step, leftovers, resumable_step, resumed_from

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("faults"), pytest.mark.timeout(1500)]

NUM_KILLS = int(os.environ.get("KILLS", "100"))
SEED = int(os.environ["KILL_SEED"])  # tests/conftest.py draws one and shows it
NUM_STEPS, SAVE_STEPS = 24, 2
LONG = (f"data.tokens={NUM_STEPS * 512}", f"training.save_steps={SAVE_STEPS}")


def start_and_kill(lab: Lab, name: str, rng: random.Random, seconds: float, num_operations: int) -> int:
    """One start that may be killed on its way; its exit code. What it may have lost is checked."""
    run = lab.runs / name
    before = resumable_step(run)
    left = 1 - (before or 0) / NUM_STEPS
    if rng.random() < 0.5:
        at = rng.randint(1, max(20, int(left * num_operations)))
        training = lab.start(name, *LONG, fault=Fault("kill", at, but=".lock"))
        code = training.wait()
    else:
        training = lab.start(name, *LONG)
        time.sleep(rng.uniform(0.2, 0.3 + 0.7 * left) * seconds)
        training.kill()
        code = training.wait()
    assert code in (0, -signal.SIGKILL), training.output
    after = resumable_step(run)  # it checks that each folder named checkpoint-<step> is complete
    assert resumed_from(training) in (None, before), "None: killed before it was said"
    assert (after or 0) >= (before or 0), "a complete checkpoint is only deleted when there is a newer one"
    assert last_step(run) - (after or 0) <= 2 * SAVE_STEPS, "not more is lost than what the writer has in hand"
    return code


def test_kills_at_random_moments_lose_nothing_complete_and_change_nothing(lab):
    print(f"KILL_SEED={SEED} KILLS={NUM_KILLS}")
    rng = random.Random(SEED)
    began = time.monotonic()
    straight = lab.train("straight", *LONG)
    seconds = time.monotonic() - began
    num_operations = len(lab.operations("listed", *LONG, but=".lock"))
    kills, ruins = 0, 0
    while kills < NUM_KILLS:
        ruins += 1
        name, code = f"killed-{ruins}", -signal.SIGKILL
        while code and kills < NUM_KILLS:
            code = start_and_kill(lab, name, rng, seconds, num_operations)
            kills += bool(code)
        if code:  # the last kill was just spent
            lab.train(name, *LONG)
        assert_same_run(lab.runs / name, straight)
        assert not code or leftovers(lab.runs / name) == []
    print(f"{kills} kills of {ruins} runs of {NUM_STEPS} steps, {time.monotonic() - began:.0f} s in all")
