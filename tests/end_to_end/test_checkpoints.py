"""Checkpoints through the front door: written in the background, on a full disk, killed, damaged, reduced."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from clm.checkpoint import find_damage
from clm.events import append_event
from clm.export import export_model
from clm.launch import pick_checkpoint
from clm.plan import make_plan
from clm.recipe import load_recipe
from clm.run_folder import list_checkpoints, list_weights
from clm.sample import load_model
from clm.saving import Saver
from data_prep.errors import UserError

from .conftest import losses, read_metrics
from .test_resume import start, weights

CHECKPOINT_BYTES = 433_000  # of the tiny run
STATE_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def steps(run: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run)]


def is_undamaged(run: Path) -> bool:
    return all(find_damage(path) is None for _, path in list_checkpoints(run))


# --- in the background -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_the_background_writes_is_byte_for_byte_what_is_written_while_training_waits(train, capsys):
    background = train("data.tokens=5120", name="background")
    text = capsys.readouterr().out
    assert "saved checkpoint-10" in text and "Training waits" not in text
    waiting = train("data.tokens=5120", "run.save_in_background=false", name="waiting")
    text = capsys.readouterr().out
    assert text.count("Training waits while a checkpoint is written: run.save_in_background is false.") == 1
    assert steps(background) == steps(waiting) == [5, 10]
    for step, folder in list_checkpoints(background):
        other = waiting / f"checkpoint-{step}"
        assert {p.name for p in folder.iterdir()} == {p.name for p in other.iterdir()}
        for name in STATE_FILES:
            assert (folder / name).read_bytes() == (other / name).read_bytes(), f"{folder.name}/{name}"
    assert losses(background) == losses(waiting) and weights(background) == weights(waiting)


def test_a_checkpoint_holds_what_stock_would_have_written(train, tmp_path, monkeypatch):
    def save(saver: Saver, model, trial) -> None:
        saver.is_engine_writing = True  # into .saving/
        Trainer._save_checkpoint(saver.trainer, model, trial)
        saver.is_engine_writing = False
        name = f"checkpoint-{saver.trainer.state.global_step}"
        shutil.move(saver.run / ".saving" / name, tmp_path / "stock" / name)
        ours(saver, model, trial)

    ours = Saver.save
    monkeypatch.setattr(Saver, "save", save)
    folder = train("data.tokens=2560") / "checkpoint-5"
    stock = tmp_path / "stock" / "checkpoint-5"
    added = {"recipe.yaml", "environment.txt", "checkpoint.json"}
    assert {p.name for p in folder.iterdir()} == {p.name for p in stock.iterdir()} - {"training_args.bin"} | added
    assert (folder / "model.safetensors").read_bytes() == (stock / "model.safetensors").read_bytes()
    assert "lm_head.weight" not in load_file(folder / "model.safetensors"), "tied weights are written once"
    assert json.loads((folder / "trainer_state.json").read_text()) == json.loads(
        (stock / "trainer_state.json").read_text()
    )
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (stock / name).read_bytes()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        ours, theirs = (torch.load(f / name, weights_only=False) for f in (folder, stock))
        assert str(ours) == str(theirs)
    lines = (folder / "environment.txt").read_text().splitlines()
    assert lines[0].startswith("# Python 3") and any(line.startswith("torch==") for line in lines)
    facts = json.loads((folder / "checkpoint.json").read_text())
    assert set(facts["files"]) == {p.name for p in folder.iterdir()} - {"checkpoint.json"}


def test_a_checkpoint_knows_the_loss_that_was_evaluated_at_exactly_its_step(train):
    run = train("run.retention={last: 9}")
    evaluated = {r["step"]: r["eval_loss"] for r in read_metrics(run) if "eval_loss" in r}
    facts = [json.loads((path / "checkpoint.json").read_text()) for _, path in list_checkpoints(run)]
    assert [f["eval_loss"] for f in facts] == [None, evaluated[10], None, evaluated[20]]


@pytest.mark.slow
def test_a_kill_while_the_background_writes_leaves_complete_checkpoints_only(train, recipe):
    straight = train(name="straight")
    run = straight.with_name("killed")
    process = start(recipe, "training.run_name=killed", "run.preflight=false")
    making = run / ".saving" / "checkpoint-10"
    deadline = time.monotonic() + 200
    while not making.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert steps(run) in ([5], [5, 10]) and is_undamaged(run)
    train(name="killed")
    assert losses(run) == losses(straight) and weights(run) == weights(straight)
    assert not (run / ".saving").exists()


def test_a_failing_write_is_reported_and_training_goes_on(train, capsys, monkeypatch, tmp_path):
    # an unwritable place under the name of the folder in the making: a file instead of a folder
    run = Path(os.environ["RUNS_DIR"]) / "tiny"
    when("saved checkpoint-5", lambda: (run / ".saving").write_text(""), monkeypatch)
    when("checkpoint-10 was not saved", lambda: (run / ".saving").unlink(), monkeypatch)
    train("run.retention={last: 9}")
    text = capsys.readouterr().out
    assert text.count("was not saved: ") == 1 and "Complete ones are untouched" in text
    assert steps(run) == [5, 15, 20] and is_undamaged(run) and (run / "final").is_dir()


# --- a full disk -----------------------------------------------------------------------------------------------------


def when(words: str, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something at the moment when a run says `words`, on the thread that says it; once."""
    done = []

    def watch(record: logging.LogRecord) -> bool:
        if not done and words in record.getMessage():
            done.append(words)
            act()
        return True

    log = logging.getLogger("clm")
    monkeypatch.setattr(log, "filters", [*log.filters, watch])


@pytest.fixture
def small_disk(recipe: Path, tmp_path: Path) -> Iterator[Path]:
    """RUNS_DIR is a disk with room for about three checkpoints of the tiny run."""
    runs = tmp_path / "runs"
    runs.mkdir()
    size = 3 * CHECKPOINT_BYTES + 300_000
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", runs], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a file system of a few bytes")
    yield runs
    subprocess.run(["umount", "-l", runs], check=True)


def fill(runs: Path) -> None:
    """Leave 100 kB."""
    (runs / "ballast").write_bytes(b"x" * (shutil.disk_usage(runs).free - 100_000))


def test_on_a_full_disk_training_goes_on_and_the_next_save_tries_again(train, small_disk, capsys, monkeypatch):
    when("saved checkpoint-5", lambda: fill(small_disk), monkeypatch)
    when("checkpoint-10 was not saved", (small_disk / "ballast").unlink, monkeypatch)
    run = train("run.retention={last: 1}", name="a")
    text = capsys.readouterr().out
    assert "checkpoint-10 was not saved: the disk is full" in text
    assert steps(run) == [20] and is_undamaged(run)
    assert sorted(losses(run)) == list(range(1, 21))
    shutil.rmtree(run)
    assert not (run / ".saving").exists()


@pytest.mark.slow
def test_when_the_last_save_does_not_fit_the_run_ends_with_an_error_and_goes_on_later(train, small_disk):
    with pytest.raises(UserError, match=r"checkpoint-20: cannot be written, the disk is full.* needs 4.* kB"):
        train("run.retention={last: 9}", "run.preflight=false")
    run = small_disk / "tiny"
    assert steps(run) == [5, 10, 15] and is_undamaged(run) and not (run / "final").exists()
    train("run.retention={last: 1}")  # one of the remedies that the message names
    assert steps(run) == [20] and (run / "final").is_dir()


@pytest.mark.slow
def test_a_run_that_pauses_on_a_full_disk_loses_no_checkpoint(train, small_disk, capsys, monkeypatch):
    when("saved checkpoint-5", lambda: fill(small_disk), monkeypatch)
    when("waits for room", (small_disk / "ballast").unlink, monkeypatch)
    when("saved checkpoint-10", lambda: shutil.copytree(run / "checkpoint-10", kept), monkeypatch)
    run, kept = small_disk / "tiny", small_disk.parent / "kept"
    train("run.retention={last: 1}", "run.full_disk=pause")
    text = capsys.readouterr().out
    assert text.count("checkpoint-10 waits for room on the disk: it needs 4") == 1
    assert "was not saved" not in text
    assert find_damage(kept) is None and steps(run) == [20]


def test_a_run_that_shall_stop_on_a_full_disk_stops(train, small_disk, monkeypatch):
    when("saved checkpoint-5", lambda: fill(small_disk), monkeypatch)
    with pytest.raises(UserError, match="checkpoint-10: cannot be written, the disk is full"):
        train("run.full_disk=stop")
    run = small_disk / "tiny"
    assert steps(run) == [5] and is_undamaged(run)
    assert max(losses(run)) < 16, "it has not waited for the next save"


def test_final_that_does_not_fit_is_written_when_the_command_is_typed_again(train, small_disk, monkeypatch):
    when("saved checkpoint-20", lambda: fill(small_disk), monkeypatch)
    with pytest.raises(UserError, match="final: cannot be written, the disk is full"):
        train("training.save_steps=10")
    assert steps(small_disk / "tiny") == [10, 20]
    (small_disk / "ballast").unlink()
    train()
    assert (small_disk / "tiny" / "final" / "model.safetensors").is_file()


# --- before the first step -------------------------------------------------------------------------------------------


def test_preflight_writes_measures_and_removes_a_checkpoint_of_full_size_once_per_run(train, capsys):
    run = train("data.tokens=2560")
    text = capsys.readouterr().out
    result = json.loads((run / "preflight.json").read_text())
    size = sum(p.stat().st_size for p in (run / "checkpoint-5").iterdir())
    assert result["num_bytes"] == pytest.approx(size, rel=0.1)
    assert text.count("preflight: a checkpoint of") == 1 and "2 of them and final/ fit" in text
    assert result["write_s"] + result["verify_s"] < 2
    (run / "final").rename(run / "gone")
    shutil.rmtree(run / "checkpoint-5")
    train("data.tokens=2560")  # from the beginning, in the same folder
    assert "preflight: a" not in capsys.readouterr().out


def test_a_disk_too_small_for_what_the_run_keeps_is_refused_before_the_first_step(train, small_disk, capsys):
    expected = r"keeps up to 20 checkpoints of 4.* lower run.retention.last.* run.preflight=false"
    with pytest.raises(UserError, match=expected):
        train("run.retention={last: 20}", "training.save_steps=1")
    run = small_disk / "tiny"
    assert not losses(run) if (run / "metrics.jsonl").exists() else True
    assert not (run / ".saving").exists() and not (run / "preflight.json").exists()
    train("run.retention={last: 1}", "training.save_steps=1")
    assert steps(run) == [20]


def test_a_full_disk_is_found_before_the_first_step(train, small_disk):
    fill(small_disk)
    with pytest.raises(UserError, match=r"has 9\d.* kB free"):
        train()
    assert not (small_disk / "tiny" / "metrics.jsonl").exists()


# --- which one is resumed from ---------------------------------------------------------------------------------------


def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_taken(train, recipe, caplog, monkeypatch):
    run = train("data.tokens=5120")
    plan = make_plan(load_recipe(recipe, ["data.tokens=5120", "training.run_name=tiny"]), 1)
    monkeypatch.setattr(logging.getLogger("clm"), "propagate", True)
    newest, before = run / "checkpoint-10", run / "checkpoint-5"
    assert pick_checkpoint(plan)[0] == newest
    names = sorted(p.name for p in newest.iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    for name in names:
        whole = (newest / name).read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for damaged in (None, whole[:-2], flipped):
            (newest / name).unlink() if damaged is None else (newest / name).write_bytes(damaged)
            caplog.clear()
            assert pick_checkpoint(plan)[0] == before, (name, damaged and len(damaged))
            if name != "checkpoint.json" or damaged:  # without it the folder is no checkpoint
                assert f"{newest}: {name} " in caplog.text and "is skipped" in caplog.text
            (newest / name).write_bytes(whole)
    caplog.clear()
    assert pick_checkpoint(plan)[0] == newest
    assert "checked 4" in caplog.text


def test_what_trained_on_rolled_back_data_is_not_resumed_from(train, recipe, caplog, monkeypatch):
    run = train("data.tokens=5120")
    plan = make_plan(load_recipe(recipe, ["data.tokens=5120", "training.run_name=tiny"]), 1)
    monkeypatch.setattr(logging.getLogger("clm"), "propagate", True)
    append_event(run, {"event": "rollback", "step": 7, "last_step": 7, "to_step": 5, "excluded": [[48, 56]]})
    assert pick_checkpoint(plan)[0] == run / "checkpoint-5"
    assert "checkpoint-10: it has trained on step 7, which was rolled back. It is skipped." in caplog.text
    append_event(run, {"event": "rollback", "step": 3, "last_step": 3, "to_step": 0, "excluded": [[16, 24]]})
    assert pick_checkpoint(plan) == (None, {}), "from the beginning, which overwrites nothing that could be used"


def test_a_checkpoint_that_only_lacked_its_rename_is_taken(train, recipe):
    run = train("data.tokens=5120")
    (run / ".saving").mkdir()
    (run / "checkpoint-10").rename(run / ".saving" / "checkpoint-10")
    plan = make_plan(load_recipe(recipe, ["data.tokens=5120", "training.run_name=tiny"]), 1)
    assert pick_checkpoint(plan)[0] == run / "checkpoint-10"
    assert not (run / ".saving").exists()


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_the_best_the_milestones_and_the_last_stay_and_the_others_become_weights(train):
    keep = "run.retention={last: 1, best: 1, every_tokens: 4_096, weights: all}"  # 4,096 tokens are 8 steps
    run = train(keep, "training.save_steps=2", "training.eval_steps=4")
    assert steps(run) == [8, 16, 20]  # the best is the last
    assert [step for step, _ in list_weights(run)] == [2, 4, 6, 10, 12, 14, 18]
    facts = json.loads((run / "weights-12" / "weights.json").read_text())
    assert facts["eval_loss"] == next(r["eval_loss"] for r in read_metrics(run) if r["step"] == 12 and "eval_loss" in r)
    (exported,) = export_model(run, 12, "lm", None, "float32")
    assert (exported / "model.safetensors").stat().st_size > 100_000
    assert load_model(run, 12)[0].config.vocab_size == 384


def test_weights_only_cannot_be_resumed_and_say_what_begins_a_new_run(train, recipe):
    run = train("data.tokens=5120", "run.retention={last: 0, weights: all}")
    assert steps(run) == [] and [step for step, _ in list_weights(run)] == [5, 10]
    (run / "final").rename(run / "gone")
    expected = r"weights-10 holds weights only.*optimizer.*schedule.*random.*model.init=\S+weights-10"
    with pytest.raises(UserError, match=expected):
        train("data.tokens=5120", "run.retention={last: 0, weights: all}")
    lines = recipe.read_text().splitlines()
    recipe.write_text("\n".join("  scaled_init: false" if "config:" in line else line for line in lines))
    new = train("data.tokens=512", f"model.init={run / 'weights-10'}", name="new")
    first = next(r["eval_loss"] for r in read_metrics(new) if "eval_loss" in r)
    assert first == pytest.approx(next(r["eval_loss"] for r in reversed(read_metrics(run)) if "eval_loss" in r))
