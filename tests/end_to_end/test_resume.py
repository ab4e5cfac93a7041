"""A killed run continues as if nothing had happened: same losses, same weights, no step twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clm.order import ORDER_VERSION
from clm.run_folder import list_checkpoints
from data_prep.errors import UserError

from .conftest import losses, read_metrics

ROOT = Path(__file__).parents[2]


def start(recipe: Path, *overrides: str) -> subprocess.Popen:
    """`python run_clm.py recipe ...` as a process of its own."""
    command = [sys.executable, str(ROOT / "run_clm.py"), str(recipe), *overrides]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_after_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """SIGKILL as soon as metrics.jsonl shows the step."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and f'"step": {step},' in (run / "metrics.jsonl").read_text():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait()
    assert process.returncode == -signal.SIGKILL


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def test_a_killed_run_ends_with_the_losses_and_weights_of_an_uninterrupted_one(train, recipe):
    straight = train(name="straight")  # with dropout: a lost random state would show
    run = straight.with_name("killed")
    kill_after_step(start(recipe, "training.run_name=killed"), run, 12)
    assert [step for step, _ in list_checkpoints(run)] in ([5], [5, 10], [10])  # that of step 10 may not be written yet
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # a torn line, as a power cut leaves it
    train(name="killed")
    assert losses(run) == losses(straight)
    assert weights(run) == weights(straight)
    steps = [r["step"] for r in read_metrics(run) if "loss" in r]
    assert steps == list(range(1, 21))
    times = [r["time_s"] for r in read_metrics(run)]
    assert times == sorted(times), "training time goes on over a resume"


def test_a_checkpoint_between_two_log_points_keeps_the_mean_that_was_being_built(train):
    straight = train("training.logging_steps=4", name="straight")
    run = train("training.logging_steps=4", "run.retention={last: 9}", name="resumed")
    (run / "final").rename(run / "gone")
    for step in (10, 20):
        (run / f"checkpoint-{step}").rename(run / f"gone-{step}")
    train("training.logging_steps=4", name="resumed")  # from step 15, three steps after the log point of step 12
    assert losses(run) == losses(straight)
    assert sorted(losses(run)) == [4, 8, 12, 16, 20]


def test_a_run_killed_before_final_is_written_needs_no_training(train):
    run = train()
    before = weights(run)
    (run / "final").rename(run / ".final-new")  # as a kill in the middle of the last write leaves it
    train()
    assert weights(run) == before
    assert not (run / ".final-new").exists()
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == list(range(1, 21))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(train, capsys, damage):
    run = train()
    before = weights(run)
    (run / "final").rename(run / "gone")
    victim = run / "checkpoint-20" / "optimizer.pt"
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[:-10])
    else:
        victim.unlink()
    capsys.readouterr()
    train()
    text = capsys.readouterr().out
    assert "checkpoint-20: optimizer.pt" in text and "is skipped" in text
    assert "continuing from" in text and "checkpoint-15" in text
    assert weights(run) == before


def test_when_every_checkpoint_is_damaged_nothing_is_overwritten(train):
    run = train()
    (run / "final").rename(run / "gone")
    for _, path in list_checkpoints(run):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint is undamaged"):
        train()
    assert len(list_checkpoints(run)) == 2


def test_a_folder_that_was_being_written_is_never_taken_for_a_checkpoint(train, recipe):
    run = train()
    (run / "final").rename(run / "gone")
    (run / ".saving" / "checkpoint-25").mkdir(parents=True)
    (run / "checkpoint-30").mkdir()  # no checkpoint.json
    (run / "checkpoint-30" / "model.safetensors").write_bytes(b"half")
    train()
    assert not (run / ".saving").exists()


def test_a_full_disk_keeps_the_complete_checkpoints_and_says_so(recipe, tmp_path):
    # a file size limit makes every write beyond it fail, as a full disk does; optimizer.pt is the largest file
    (Path(os.environ["RUNS_DIR"])).mkdir()
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f 150; exec "{sys.executable}" "{ROOT}/run_clm.py" "{recipe}"'],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr and "Traceback" not in done.stderr
    run = Path(os.environ["RUNS_DIR"]) / "tiny"
    assert list_checkpoints(run) == [] and not list(run.glob("checkpoint-*"))


def test_a_second_training_of_one_run_is_refused_while_the_first_lives(train, recipe):
    run = Path(os.environ["RUNS_DIR"]) / "tiny"
    first = start(recipe, "training.run_name=tiny")
    try:
        while not (run / "metrics.jsonl").is_file() and first.poll() is None:
            time.sleep(0.02)
        with pytest.raises(UserError, match=f"process {first.pid} is training it"):
            train()
    finally:
        first.wait(timeout=200)
    assert first.returncode == 0
    train()  # finished: nothing to do


def test_rotation_goes_by_step_number(train):
    run = train("run.retention={last: 3}", "training.save_steps=1")
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-18", "checkpoint-19", "checkpoint-20"]
    facts = json.loads((run / "checkpoint-20" / "checkpoint.json").read_text())
    assert (facts["step"], facts["tokens"], facts["order_version"]) == (20, 10240, ORDER_VERSION)
    assert "optimizer.pt" in facts["files"] and len(facts["files"]["optimizer.pt"]["sha256"]) == 64
