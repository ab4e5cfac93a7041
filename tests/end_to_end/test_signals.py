"""A signal, SAVE or STOP: all ranks save at the same step, and the run that goes on from there is the same run."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from clm.fork_server import ForkServer, Training
from clm.run_folder import list_checkpoints
from clm.signals import COPIES_S, EXIT_STOPPED

from .conftest import losses, read_metrics

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LONG = ("data.tokens=2_048_000", "data.max_epochs=99", "training.eval_strategy='no'")  # it is stopped long before
UNSAVED = ("training.save_steps=10_000", "training.logging_steps=4")  # so that only requests save


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as started:
        yield started


@pytest.fixture
def start(server: ForkServer, recipe: Path, tmp_path: Path) -> Callable[..., list[Training]]:
    """Start a training of one or more processes without a launcher, as `srun` would, in a group of its own each."""

    def begin(*overrides: str, name: str = "tiny", num_processes: int = 1) -> list[Training]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        address = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        trainings = []
        for rank in map(str, range(num_processes)):
            env = {**address, "RANK": rank, "LOCAL_RANK": rank} if num_processes > 1 else {}
            argv = [ROOT / "run_clm.py", recipe, *overrides, f"training.run_name={name}"]
            log = tmp_path / f"{name}-{rank}-{time.monotonic_ns()}.txt"
            trainings.append(server.start(argv, log, {**env, "RUNS_DIR": os.environ["RUNS_DIR"]}, ROOT))
        return trainings

    return begin


@pytest.fixture
def run() -> Callable[[str], Path]:
    return lambda name="tiny": Path(os.environ["RUNS_DIR"]) / name


def wait_until(happened: Callable[[], bool], alive: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert alive() and time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_log_point(folder: Path, training: Training, after: int) -> None:
    """Until metrics.jsonl has a training loss of a step beyond `after`."""

    def is_there() -> bool:
        text = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").is_file() else ""
        return max(losses(folder), default=0) > after if text.endswith("\n") else False

    wait_until(is_there, lambda: training.poll() is None)


def newest(folder: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    return max((step for step, _ in list_checkpoints(folder)), default=0)


def weights(folder: Path) -> bytes:
    return (folder / "final" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_each_signal_saves_and_stops_and_the_run_goes_on_bit_for_bit(start, train, run):
    length = ("data.tokens=40_960", *UNSAVED)  # 80 steps, with dropout: a lost random state would show
    straight = train(*length, name="straight")
    folder, step = run("stopped"), 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        (training,) = start(*length, name="stopped")
        wait_for_log_point(folder, training, after=step)
        training.kill(number)
        assert training.wait() == EXIT_STOPPED == 75, training.output
        name = number.name
        assert f"{name}: saving at the end of this step, then stopping; another one" in training.output
        assert newest(folder) > step and not (folder / "final").exists()
        step = newest(folder)
        assert f"{name}: saved at step {step} of 80 and stopped; the same command continues." in training.output
        assert "Traceback" not in training.output
    train(*length, name="stopped")
    assert losses(folder) == losses(straight) and sorted(losses(straight)) == list(range(4, 81, 4))
    assert weights(folder) == weights(straight)


def test_save_saves_and_stop_stops(start, run):
    (training,) = start(*LONG, *UNSAVED)
    folder = run()
    wait_for_log_point(folder, training, after=0)
    (folder / "SAVE").touch()
    wait_until(lambda: not (folder / "SAVE").exists(), lambda: training.poll() is None)
    wait_until(lambda: newest(folder) > 0, lambda: training.poll() is None)
    saved = newest(folder)
    assert f"{folder / 'SAVE'}: saving at step {saved}, training goes on" in training.output
    wait_for_log_point(folder, training, after=saved)
    (folder / "STOP").touch()
    assert training.wait() == 0, training.output
    stopped = newest(folder)
    assert stopped > saved and not (folder / "STOP").exists() and not (folder / "final").exists()
    said = f"{folder / 'STOP'}: saved at step {stopped} of 4,000 and stopped; the same command continues."
    assert said in training.output
    assert f"{saved}" in [str(step) for step, _ in list_checkpoints(folder)]


def test_a_file_from_before_the_start_is_removed_and_said(train, run, capsys):
    run().mkdir(parents=True)
    (run() / "STOP").touch()
    train("data.tokens=1024")
    assert (run() / "final").is_dir() and not (run() / "STOP").exists()
    assert "STOP: was there before this start, removed" in capsys.readouterr().out


@pytest.mark.parametrize("step, code", [(0, 143), (10, 75), (20, 0)])
def test_a_signal_before_the_first_step_during_an_evaluation_and_at_the_last_step(start, run, step, code):
    # texts are sampled after the evaluation of these steps, which takes long enough to meet it
    (training,) = start("run.samples={prompts: [The river, Every reader], max_new_tokens: 100}")
    line = f"step {step}  validation loss"
    wait_until(lambda: line in training.output, lambda: training.poll() is None)
    training.kill(signal.SIGTERM)
    assert training.wait() == code, training.output
    if step == 0:
        assert "SIGTERM before the first step: there is nothing to save, stopped at once" in training.output
        assert newest(run()) == 0
    elif step == 10:
        assert newest(run()) == 11 and "saved at step 11 of 20" in training.output
    else:
        assert "SIGTERM: the last step is done, the run finishes" in training.output
        assert (run() / "final").is_dir() and read_metrics(run())[-1]["finished"]


def test_a_signal_to_the_whole_process_group_spares_the_loader_workers(start, run):
    (training,) = start(*LONG, *UNSAVED, "training.dataloader_num_workers=1")
    wait_for_log_point(run(), training, after=0)
    os.killpg(training.pid, signal.SIGTERM)
    assert training.wait() == EXIT_STOPPED, training.output
    assert newest(run()) > 0 and "Traceback" not in training.output


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step_bit_for_bit(start, run):
    length = ("data.tokens=20_480", *UNSAVED, "training.eval_strategy='no'")
    for training in start(*length, name="straight", num_processes=2):
        assert training.wait() == 0, training.output
    both = start(*length, name="stopped", num_processes=2)
    wait_for_log_point(run("stopped"), both[0], after=0)
    both[1].kill(signal.SIGUSR1)
    assert [training.wait() for training in both] == [EXIT_STOPPED] * 2, both[0].output + both[1].output
    step = newest(run("stopped"))
    assert 4 < step < 40
    assert f"SIGUSR1: saving at step {step}, then stopping" in both[0].output
    for training in start(*length, name="stopped", num_processes=2):
        assert training.wait() == 0, training.output
    assert losses(run("stopped")) == losses(run("straight"))
    assert weights(run("stopped")) == weights(run("straight"))


def test_a_second_signal_exits_at_once_also_where_the_first_can_never_be_followed(start, run):
    both = start(*LONG, *UNSAVED, num_processes=2)
    wait_for_log_point(run(), both[0], after=0)
    both[1].kill(signal.SIGSTOP)  # a peer that hangs: the main thread waits for it in C++, and no handler runs
    time.sleep(0.2)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):  # Slurm's two, and a launcher's copy
        both[0].kill(number)
        time.sleep(0.1)
        assert both[0].poll() is None, both[0].output
    time.sleep(COPIES_S)
    both[0].kill(signal.SIGINT)
    assert both[0].wait(timeout_s=30) == 128 + signal.SIGINT
    assert "SIGINT a second signal: stopped at once" in both[0].output
    assert newest(run()) == 0


def test_a_stop_whose_save_fails_says_so_and_nobody_waits(start, run):
    both = start(*LONG, *UNSAVED, num_processes=2)
    wait_for_log_point(run(), both[0], after=0)
    for training in both:  # every larger file fails as on a full disk
        resource.prlimit(training.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    began = time.monotonic()
    both[1].kill(signal.SIGTERM)
    assert both[0].wait() == 2, both[0].output
    assert both[1].wait() in (1, 2), both[1].output
    assert time.monotonic() - began < 60
    assert "error: " in both[0].output and "the disk is full" in both[0].output
    assert "and stopped; the same command continues" not in both[0].output
    assert newest(run()) == 0


# --- launchers --------------------------------------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [str(BIN / "accelerate"), "launch", "--quiet"]
TWO = [*ACCELERATE, "--num_processes", "2", "--main_process_port", "0"]


def launch(tmp_path: Path, *command: str | Path, **env: str) -> tuple[subprocess.Popen, Path]:
    log = tmp_path / "launched.txt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    with open(log, "w") as file:
        launcher = subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    return launcher, log


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the end of a launcher is seen on Linux only")
@pytest.mark.parametrize(
    "command, number, code",
    [
        (TORCHRUN, signal.SIGTERM, 1),  # forwarded
        (TORCHRUN, signal.SIGINT, 1),
        (TORCHRUN, signal.SIGKILL, -9),  # the kernel tells the processes that their launcher is gone
        (TORCHRUN, signal.SIGUSR1, -10),  # torchrun does not handle it
        (ACCELERATE, signal.SIGTERM, -15),  # one process: nothing is forwarded
        ([*TWO, "--multi_gpu"], signal.SIGTERM, 1),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value),
)
def test_a_signal_to_the_launcher_saves_and_stops(command, number, code, recipe, run, tmp_path):
    env = {"ACCELERATE_USE_CPU": "1"} if "--multi_gpu" in command else {}
    overrides = [*LONG, *UNSAVED, "training.dataloader_num_workers=1", "training.report_to=[tensorboard, wandb]"]
    launcher, log = launch(tmp_path, *command, "run_clm.py", recipe, *overrides, **env)
    wait_for_log_point(run(), launcher, after=0)
    trainings = children(launcher.pid)
    launcher.send_signal(number)
    assert launcher.wait(timeout=60) == code, log.read_text()
    wait_until(lambda: not any(map(is_alive, trainings)), lambda: True)
    assert f"saved at step {newest(run())} of 4,000 and stopped" in log.read_text()
    assert "DataLoader worker" not in log.read_text()
    assert "wandb sync" in log.read_text()  # its run was finished, which os._exit would have skipped


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_launcher_and_training_and_counts_once(recipe, run, tmp_path):
    launcher, log = launch(tmp_path, *ACCELERATE, "run_clm.py", recipe, *LONG, *UNSAVED)
    wait_for_log_point(run(), launcher, after=0)
    trainings = children(launcher.pid)
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(timeout=60) == -signal.SIGINT
    wait_until(lambda: not any(map(is_alive, trainings)), lambda: True)
    assert f"SIGINT: saved at step {newest(run())} of 4,000 and stopped" in log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its CPU communication with c++")
def test_zero_2_on_two_processes_stops_at_one_step_and_goes_on_bit_for_bit(recipe, run, tmp_path):
    pytest.importorskip("deepspeed", exc_type=ImportError)
    zero = [*TWO, "--config_file", "accelerate_configs/zero2.yaml", "run_clm.py", recipe, "data.tokens=20_480"]
    overrides = [*UNSAVED, "training.eval_strategy='no'", "training.run_name="]
    for name in ("straight", "stopped", "stopped"):
        launcher, log = launch(tmp_path, *zero, *overrides[:-1], overrides[-1] + name)
        if name == "stopped" and newest(run(name)) == 0:
            wait_for_log_point(run(name), launcher, after=0)
            os.kill(children(launcher.pid)[1], signal.SIGTERM)
            assert launcher.wait(timeout=120) == 1
            assert f"SIGTERM: saved at step {newest(run(name))} of 40 and stopped" in log.read_text()
        else:
            assert launcher.wait(timeout=240) == 0, log.read_text()
    assert losses(run("stopped")) == losses(run("straight"))
    ends = [load_file(run(name) / "final" / "model.safetensors") for name in ("straight", "stopped")]
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])
