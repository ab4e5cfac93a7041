"""Two real processes give the curve of one, and a launch that starts fewer than were asked for is refused."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_prep.errors import UserError

from .conftest import losses, quiet_config

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launch(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_and_resume_as_one(train, recipe):
    quiet = quiet_config(recipe)
    one = train(quiet, "data.tokens=5120", name="one")
    done = launch(*TORCHRUN, "run_clm.py", str(recipe), quiet, "data.tokens=5120", "training.run_name=two")
    assert done.returncode == 0, done.stderr
    two = one.with_name("two")
    assert "x 2 processes x 1 accumulation" in done.stdout
    assert done.stdout.count("final model:") == 1
    assert first_weights(two) == first_weights(one)
    assert np.allclose(list(losses(one).values()), list(losses(two).values()), rtol=1e-5)
    # the same run goes on with one process from its step 5
    (two / "final").rename(two / "gone")
    (two / "checkpoint-10").rename(two / "gone-10")
    train(quiet, "data.tokens=5120", name="two")
    assert np.allclose(list(losses(one).values()), list(losses(two).values()), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its CPU communication with c++")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_on_two_processes_gives_the_losses_and_the_weights_of_one(train, recipe, stage):
    pytest.importorskip("deepspeed", exc_type=ImportError)
    quiet = quiet_config(recipe)
    one = train(quiet, "data.tokens=5120", name="one")
    launcher = [str(BIN / "accelerate"), "launch", "--quiet", "--config_file", f"accelerate_configs/zero{stage}.yaml"]
    two = [*launcher, "--num_processes", "2", "--main_process_port", "0", "run_clm.py", str(recipe)]
    done = launch(*two, quiet, "data.tokens=5120", "training.run_name=two")
    assert done.returncode == 0, done.stderr
    run = one.with_name("two")
    assert np.allclose(list(losses(one).values()), list(losses(run).values()), rtol=1e-5)
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (one, run)]
    assert all(np.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])
    assert weights[0].keys() == weights[1].keys()
    assert first_weights(run) == first_weights(one)
    # a kill before final/ was written: the engine's own checkpoint is complete and taken up again
    (run / "final").rename(run / "gone")
    (run / "checkpoint-10").rename(run / "gone-10")
    done = launch(*two, quiet, "data.tokens=5120", "training.run_name=two")
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stderr
    assert np.allclose(list(losses(one).values()), list(losses(run).values()), rtol=1e-5)
    if stage != 2:
        return
    # what this launch cannot read is refused, in both directions
    for name in ("one", "two"):
        (one.with_name(name) / "final").rename(one.with_name(name) / "gone-again")
    with pytest.raises(UserError, match="by DeepSpeed with 2 processes, .* this launch is without DeepSpeed"):
        train(quiet, "data.tokens=5120", name="two")
    done = launch(*two, quiet, "data.tokens=5120", "training.run_name=one")
    assert done.returncode != 0 and "was written by DDP or one process, which DeepSpeed cannot read" in done.stderr


@pytest.mark.slow
def test_a_base_models_weights_are_the_same_under_every_launcher(train, recipe):
    base = train("data.tokens=2560", name="base") / "final"
    short = ["model.config=null", f"model.init={base}", "data.tokens=512", "data.validation=[]"]
    expected = first_weights(train(*short, name="one"))
    assert expected != first_weights(base.parent)
    for name, environment in (("fsdp2", {"CLM_FSDP_ON_CPU": "1"}), ("zero3", {})):
        if name == "zero3" and (shutil.which("c++") is None or find_spec("deepspeed") is None):
            continue
        config = f"accelerate_configs/{name}.yaml"
        command = [str(BIN / "accelerate"), "launch", "--quiet", "--config_file", config, "--num_processes", "2"]
        command += ["--main_process_port", "0", "run_clm.py", str(recipe), *short, f"training.run_name={name}"]
        done = launch(*command, **environment)
        assert done.returncode == 0, done.stderr
        assert first_weights(base.parents[1] / name) == expected


def first_weights(run: Path) -> str:
    """The hash of the first weights that a run's log names."""
    return re.search(r"first weights (\w{16})", (run / "train.log").read_text())[1]


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


def test_work_of_a_process_group_left_at_the_end_does_not_abort_the_process(tmp_path):
    script = tmp_path / "left.py"
    script.write_text(
        "import torch, run_clm\n"
        "from torch import distributed\n"
        "distributed.init_process_group('gloo')\n"
        "for _ in range(200):\n"
        "    distributed.all_reduce(torch.zeros(1_000_000), async_op=True)\n"  # nobody waits, nobody keeps the tensor
        "print('done')\n"
        "run_clm.end_process(0)\n"
    )
    done = launch(*TORCHRUN, str(script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2
