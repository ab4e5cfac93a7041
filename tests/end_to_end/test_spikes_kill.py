"""A kill in the middle of a rollback loses nothing, and several processes decide as one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clm.events import read_events
from clm.fork_server import ForkServer

from .conftest import losses, quiet_config
from .poison import on, spikes, weights

ROOT = Path(__file__).parents[2]
MOMENTS = [  # in the order in which a rollback passes them
    ("clm/spikes.py:_write_rollback", "call", 1),  # decided and reported, nothing written
    ("clm/events.py:append_event", "return", 2),  # the event is on the disk; the first is the spike's
    ("clm/saving.py:finish", "call", 1),  # the training has ended
    ("clm/launch.py:pick_checkpoint", "call", 2),  # on the way in again
    ("clm/metrics.py:cut_back_run", "call", 2),
    ("clm/metrics.py:cut_back", "return", 4),  # some of the .jsonl files are cut back
    ("clm/trainer.py:__init__", "return", 2),
    ("clm/saving.py:save", "call", 5),  # behind it: saving step 50 again
]


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_rollback_changes_nothing(train, recipe, poisoned, tmp_path):
    overrides = on(poisoned, "rollback")
    straight = train(*overrides, name="straight")
    (expected,) = spikes(straight, "rollback")
    with ForkServer() as server:
        for number, (function, moment, count) in enumerate(MOMENTS):
            run = straight.with_name(f"killed-{number}")
            command = ["run_clm.py", recipe, *overrides, f"training.run_name={run.name}"]
            kill_at = [Path(__file__).with_name("kill_at.py"), function, moment, count]
            killed = server.start([*kill_at, *command], tmp_path / f"killed-{number}.txt", cwd=ROOT)
            assert killed.wait() == -signal.SIGKILL, (function, killed.output)
            resumed = server.start(command, tmp_path / f"resumed-{number}.txt", cwd=ROOT)
            assert resumed.wait() == 0, resumed.output
            (event,) = spikes(run, "rollback")
            assert {**event, "at": None} == {**expected, "at": None}, function
            assert losses(run) == losses(straight), function
            assert weights(run / "final") == weights(straight / "final"), function


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["rollback", "skip", "report"])
def test_two_processes_decide_as_one(train, recipe, poisoned, policy):
    overrides = [quiet_config(recipe), *on(poisoned, policy, "training.per_device_train_batch_size=8")]
    one = train(*overrides, name="one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, "run_clm.py", recipe, *overrides, "training.run_name=two"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    two = one.with_name("two")
    assert [(e["event"], e["step"], e["last_step"], e.get("excluded")) for e in read_events(two)] == [
        (e["event"], e["step"], e["last_step"], e.get("excluded")) for e in read_events(one)
    ]
    assert np.allclose(list(losses(one).values()), list(losses(two).values()), rtol=1e-3)
    assert done.stdout.count("step-41/text.html") == 1, "one process tells"
