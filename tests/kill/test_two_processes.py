"""Two processes of one training, of which one is killed: the other ends by itself, and the resume is exact."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .lab import (
    FSDP2,
    ROOT,
    Fault,
    Lab,
    assert_same_run,
    checkpoint_steps,
    last_step,
    leftovers,
    losses,
    resumable_step,
    resumed_from,
)
from .test_random_kills import SEED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

NUM_KILLS = int(os.environ.get("PAIR_KILLS", "20"))
NUM_STEPS, SAVE_STEPS = 16, 2
SHAPE = (f"data.tokens={NUM_STEPS * 512}", f"training.save_steps={SAVE_STEPS}", "training.ddp_timeout=30")
END_WITHIN_S = 90


def train_on_two(lab: Lab, name: str, env: dict[str, str] | None = None) -> Path:
    ranks = lab.start_ranks(name, 2, *SHAPE, env=env)
    codes = [rank.wait() for rank in ranks]
    assert codes == [0, 0], "\n".join(rank.output for rank in ranks)
    return lab.runs / name


def assert_resumes_exactly(lab: Lab, name: str, straight: Path, env: dict[str, str] | None = None) -> None:
    step = resumable_step(lab.runs / name)
    assert last_step(lab.runs / name) - (step or 0) <= 2 * SAVE_STEPS
    ranks = lab.start_ranks(name, 2, *SHAPE, env=env)
    codes = [rank.wait() for rank in ranks]
    assert codes == [0, 0], "\n".join(rank.output for rank in ranks)
    assert resumed_from(ranks[0]) == step
    assert_same_run(lab.runs / name, straight)
    assert leftovers(lab.runs / name) == []


def test_one_of_two_is_killed_and_the_other_ends_by_itself(lab):
    print(f"KILL_SEED={SEED} PAIR_KILLS={NUM_KILLS}")
    rng = random.Random(SEED)
    began = time.monotonic()
    straight = train_on_two(lab, "straight")
    seconds = time.monotonic() - began
    for number in range(NUM_KILLS):
        victim, name = number % 2, f"killed-{number}"
        ranks = lab.start_ranks(name, 2, *SHAPE)
        if rng.random() < 0.5:  # at any moment, also before the first step
            time.sleep(rng.uniform(0.2, 0.9 * seconds))
        else:
            wanted = rng.randint(1, NUM_STEPS - 2)
            while last_step(lab.runs / name) < wanted and ranks[victim].poll() is None:
                time.sleep(0.002)
        ranks[victim].kill()
        code, other = ranks[victim].wait(), ranks[1 - victim]
        if code != -signal.SIGKILL:  # it was faster, and has finished
            assert (code, other.wait()) == (0, 0), other.output
            continue
        assert other.wait(END_WITHIN_S) not in (0, None)
        assert f"process {victim} " in other.output.rpartition("error: ")[2], other.output
        assert_resumes_exactly(lab, name, straight)


@pytest.mark.usefixtures("faults")
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("launcher", ["ddp", "fsdp2"])
def test_one_of_two_is_killed_while_it_writes_its_part_of_a_checkpoint(lab, victim, launcher):
    print(f"KILL_SEED={SEED}")
    rng = random.Random(SEED + victim)
    env = FSDP2 if launcher == "fsdp2" else None
    straight = train_on_two(lab, "straight", env)
    fault = Fault("kill", rng.randint(1, 3), "checkpoint-6", rank=str(victim))
    ranks = lab.start_ranks("killed", 2, *SHAPE, fault=fault, env=env)
    assert ranks[victim].wait() == -signal.SIGKILL, ranks[victim].output
    assert ranks[1 - victim].wait(END_WITHIN_S) not in (0, None)
    assert resumable_step(lab.runs / "killed") == 4
    assert_resumes_exactly(lab, "killed", straight, env)


@pytest.mark.usefixtures("faults")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_shards_cannot_be_written_is_named_and_training_goes_on(lab, victim):
    straight = train_on_two(lab, "straight", FSDP2)
    fault = Fault("eio", 1, "checkpoint-6/sharded/__", rank=str(victim))
    ranks = lab.start_ranks("failed", 2, *SHAPE, "run.retention={last: 9}", fault=fault, env=FSDP2)
    assert [rank.wait() for rank in ranks] == [0, 0], "\n".join(rank.output for rank in ranks)
    assert "checkpoint-6 was not saved" in ranks[0].output
    assert victim == 0 or "process 1: " in ranks[0].output
    assert checkpoint_steps(lab.runs / "failed") == [2, 4, 8, 10, 12, 14, 16]
    assert_same_run(lab.runs / "failed", straight)


def test_a_process_whose_disk_is_full_is_named_and_the_run_goes_on_from_the_last_complete_checkpoint(lab):
    straight = train_on_two(lab, "straight", FSDP2)
    keep = "run.retention={last: 9}"
    ranks = lab.start_ranks("full", 2, *SHAPE, keep, env=FSDP2)
    while last_step(lab.runs / "full") < 5 and ranks[1].poll() is None:
        time.sleep(0.002)
    fill_disk_of(ranks[1].pid)
    assert [rank.wait(END_WITHIN_S) for rank in ranks] == [2, 2], "\n".join(rank.output for rank in ranks)
    assert "was not saved: process 1: the disk is full (or" in ranks[0].output
    last = f"checkpoint-{NUM_STEPS}: cannot be written, process 1: the disk is full"
    assert last in ranks[0].output.rpartition("error: ")[2] and "Traceback" not in ranks[0].output
    steps = checkpoint_steps(lab.runs / "full")
    assert 2 <= max(steps) <= 8 and leftovers(lab.runs / "full") == []
    assert set(re.findall(r"process \d: the disk", ranks[0].output)) == {"process 1: the disk"}
    ranks = lab.start_ranks("full", 2, *SHAPE, keep, env=FSDP2)
    assert [rank.wait() for rank in ranks] == [0, 0], "\n".join(rank.output for rank in ranks)
    assert resumed_from(ranks[0]) == max(steps)
    assert_same_run(lab.runs / "full", straight)

    # from the beginning: nothing is trained
    ranks = lab.start_ranks("never", 2, *SHAPE, env=FSDP2)
    fill_disk_of(ranks[1].pid)
    assert [rank.wait(END_WITHIN_S) for rank in ranks] == [2, 2], "\n".join(rank.output for rank in ranks)
    assert "error: process 1: " in ranks[0].output and "the disk is full" in ranks[0].output
    assert last_step(lab.runs / "never") == 0 and leftovers(lab.runs / "never") == []


def fill_disk_of(pid: int) -> None:
    """No file that it writes from now on can be larger than 40 kB; a shard of a checkpoint is."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))


def test_two_processes_that_share_a_full_disk_end_with_the_cause_and_go_on_when_there_is_room(lab):
    lab.runs.mkdir(exist_ok=True)
    straight = train_on_two(lab, "straight", FSDP2)
    checkpoint = max(lab.runs.glob("straight/checkpoint-*"))
    num_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*"))
    runs, lab.runs = lab.runs, lab.folder / "small"
    lab.runs.mkdir()
    options = f"size={int(2.7 * num_bytes)}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", lab.runs], capture_output=True).returncode:
        pytest.skip("only root can mount a file system of a few bytes")
    try:
        more = ["run.retention={last: 9}", "run.preflight=false"]
        ranks = lab.start_ranks("full", 2, *SHAPE, *more, env=FSDP2)
        assert [rank.wait(END_WITHIN_S) for rank in ranks] == [2, 2], "\n".join(rank.output for rank in ranks)
        errors = ranks[0].output.split("error: ")[1:]  # of both
        assert any("the disk is full" in error for error in errors), errors
        assert "Traceback" not in ranks[0].output + ranks[1].output
        assert checkpoint_steps(lab.runs / "full") == [2, 4] and leftovers(lab.runs / "full") == []
        ranks = lab.start_ranks("full", 2, *SHAPE, env=FSDP2)  # keeps one
        assert [rank.wait() for rank in ranks] == [0, 0], "\n".join(rank.output for rank in ranks)
        assert resumed_from(ranks[0]) == 4
        assert losses(lab.runs / "full") == losses(straight)
    finally:
        subprocess.run(["umount", "-l", lab.runs], check=True)
        lab.runs = runs


def test_under_torchrun_a_killed_process_ends_the_launch_and_leaves_no_process(lab):
    print(f"KILL_SEED={SEED}")
    rng = random.Random(SEED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "run_clm.py"), str(lab.recipe), *SHAPE]
    env = {**os.environ, "RUNS_DIR": str(lab.runs), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def launch(name: str) -> subprocess.Popen:
        named = [*command, f"training.run_name={name}"]
        with open(lab.folder / f"{name}.txt", "a") as log:
            return subprocess.Popen(named, env=env, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)

    straight = train_on_two(lab, "straight")  # not by torchrun: the launcher makes no difference
    for victim in (0, 1):
        name = f"killed-{victim}-{rng.randrange(10**6)}"
        launched = launch(name)
        wanted = rng.randint(1, NUM_STEPS - 2)
        while last_step(lab.runs / name) < wanted and launched.poll() is None:
            time.sleep(0.002)
        (target,) = [pid for pid, rank in ranks_of(name).items() if rank == victim]
        os.kill(target, signal.SIGKILL)
        assert launched.wait(END_WITHIN_S) not in (0, None)
        assert ranks_of(name) == {}, "no process of it is left"
        step = resumable_step(lab.runs / name)
        again = launch(name)
        assert again.wait(200) == 0, (lab.folder / f"{name}.txt").read_text()
        assert not step or f"checkpoint-{step}" in (lab.folder / f"{name}.txt").read_text()
        assert_same_run(lab.runs / name, straight)


def ranks_of(name: str) -> dict[int, int]:
    """The living processes that train run `name`: process number -> rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if f"training.run_name={name}".encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                values = (folder / "environ").read_bytes().split(b"\0")
                found |= {int(folder.name): int(v.partition(b"=")[2]) for v in values if v.startswith(b"RANK=")}
    return found
