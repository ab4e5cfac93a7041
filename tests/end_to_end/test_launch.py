"""Two real processes give the curve of one, and a launch that starts fewer than were asked for is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .conftest import losses, quiet_config

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def launch(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_two_processes_give_the_losses_of_one_and_resume_as_one(train, recipe):
    quiet = quiet_config(recipe)
    one = train(quiet, "data.tokens=5120", name="one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = launch(*torchrun, "run_clm.py", str(recipe), quiet, "data.tokens=5120", "training.run_name=two")
    assert done.returncode == 0, done.stderr
    two = one.with_name("two")
    assert "x 2 processes x 1 accumulation" in done.stdout
    assert done.stdout.count("final model:") == 1
    assert np.allclose(list(losses(one).values()), list(losses(two).values()), rtol=1e-5)
    # the same run goes on with one process from its step 5
    (two / "final").rename(two / "gone")
    (two / "checkpoint-10").rename(two / "gone-10")
    train(quiet, "data.tokens=5120", name="two")
    assert np.allclose(list(losses(one).values()), list(losses(two).values()), rtol=1e-5)


def test_accelerate_launch_trains(recipe):
    done = launch(str(BIN / "accelerate"), "launch", "--quiet", "run_clm.py", str(recipe), "data.tokens=1024")
    assert done.returncode == 0, done.stderr
    assert "final model:" in done.stdout


def test_accelerate_launch_that_would_start_one_process_instead_of_two_is_refused(recipe):
    done = launch(
        str(BIN / "accelerate"), "launch", "--quiet", "--cpu", "--num_processes", "2", "run_clm.py", str(recipe)
    )
    assert done.returncode != 0
    assert "was asked for several processes but started one" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["recipes/nope.yaml"], "does not exist"),
        (["recipes/demo.yaml", "training.learning_rte=1"], "Did you mean learning_rate"),
        (["recipes/demo.yaml"], "make prep DATASET=stdlib"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(run_cli, tmp_path, arguments, expected):
    result = run_cli(
        [ROOT / "run_clm.py", *arguments], env={"DATA_DIR": str(tmp_path), "RUNS_DIR": str(tmp_path / "runs")}
    )
    assert result.code == 2
    assert expected in result.stderr and result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()
