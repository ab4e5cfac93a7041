"""A process of several that is missing, different, killed or stopped is named, and nothing hangs or is lost by it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from .lab import ROOT, Lab, checkpoint_steps, last_step, resumed_from
from .test_random_kills import SEED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TIMEOUT_S = 10
LONG = ("data.tokens=204800", "training.save_steps=5", f"training.ddp_timeout={TIMEOUT_S}", "data.max_epochs=9")
END_WITHIN_S = 4 * TIMEOUT_S


def start_each(lab: Lab, name: str, *overrides: list[str], num_processes: int | None = None) -> list:
    """Start one process for each list of overrides."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    together["WORLD_SIZE"] = str(num_processes or len(overrides))
    return [
        lab.start(name, *LONG, *own, env={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, own in enumerate(overrides)
    ]


def wait_for_step(lab: Lab, name: str, step: int, ranks: list) -> None:
    while last_step(lab.runs / name) < step:
        assert all(rank.poll() is None for rank in ranks), "\n".join(rank.output for rank in ranks)
        time.sleep(0.01)


def test_every_process_says_where_it_is_and_one_that_does_not_come_is_named(lab):
    (only,) = start_each(lab, "alone", [], num_processes=2)
    assert only.wait(END_WITHIN_S) == 2
    assert f"process 0 of 2: host {socket.gethostname()}, device cpu, pid" in only.output
    assert f"process 1 of 2 did not come within {TIMEOUT_S} s. Nothing was trained." in only.output
    assert "Traceback" not in only.output and not (lab.runs / "alone").exists()


def test_a_process_with_another_recipe_or_other_data_or_none_is_named_by_all(lab, second_dataset):
    host = socket.gethostname()
    for name, own, expected in (
        (
            "rate",
            ["training.learning_rate=2e-2"],
            f"process 1 on {host} has training.learning_rate 0.02, process 0",
        ),
        ("data", [f"data.mixture=[{{dataset: {second_dataset}}}]"], f"process 1 on {host} has data."),
        ("none", ["data.mixture=[{dataset: data/nowhere}]"], f"process 1 on {host} has ended: "),
    ):
        ranks = start_each(lab, name, [], own)
        assert [rank.wait(END_WITHIN_S) for rank in ranks] == [2, 2], ranks[0].output
        assert expected in ranks[0].output, ranks[0].output
        assert all("Traceback" not in rank.output for rank in ranks)
        assert not (lab.runs / name).exists(), "before anything is written"


def test_a_process_with_other_code_is_named(lab, tmp_path):
    copy = tmp_path / "other"
    for tree in ("clm", "data_prep"):
        shutil.copytree(ROOT / tree, copy / tree, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "run_clm.py", copy / "run_clm.py")
    (copy / "clm" / "order.py").write_text((ROOT / "clm" / "order.py").read_text() + "\n# changed\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RUNS_DIR": str(lab.runs)}
    processes = [
        subprocess.Popen(
            [sys.executable, root / "run_clm.py", lab.recipe, *LONG],
            env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(root)},
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, root in enumerate((ROOT, copy))
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert f"process 1 on {socket.gethostname()} has code " in errors[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_by_the_other_and_the_run_goes_on_afterwards(lab, victim):
    rng = random.Random(SEED + victim)
    ranks = start_each(lab, "killed", [], [])
    wait_for_step(lab, "killed", rng.randint(6, 30), ranks)
    ranks[victim].kill()
    other = ranks[1 - victim]
    assert other.wait(END_WITHIN_S) == 2, other.output
    assert f"error: process {victim} on {socket.gethostname()} (pid " in other.output
    assert "has given no sign of life for" in other.output
    steps = checkpoint_steps(lab.runs / "killed")
    length = ["data.tokens=20480", "--allow-changes"]
    again = start_each(lab, "killed", length, length)
    assert [rank.wait(100) for rank in again] == [0, 0], again[0].output
    assert (resumed_from(again[0]) or 0) >= max(steps, default=0)
    assert not (lab.runs / "killed" / ".ranks").exists()


def test_a_stopped_process_is_named_within_the_timeout(lab):
    ranks = start_each(lab, "stopped", [], [])
    wait_for_step(lab, "stopped", 3, ranks)
    target = json.loads((lab.runs / "stopped" / ".ranks" / "1.json").read_text())["pid"]
    os.kill(target, signal.SIGSTOP)
    try:
        stopped_at = time.monotonic()
        assert ranks[0].wait(END_WITHIN_S) == 2, ranks[0].output
        assert time.monotonic() - stopped_at < 3 * TIMEOUT_S
        assert f"(pid {target}) has given no sign of life for" in ranks[0].output
        assert "error: process 1 on " in ranks[0].output
    finally:
        os.kill(target, signal.SIGCONT)
    assert ranks[1].wait(END_WITHIN_S) not in (0, None), "it finds the other gone and ends by itself"
    checkpoint_steps(lab.runs / "stopped")
