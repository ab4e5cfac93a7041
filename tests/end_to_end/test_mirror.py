"""A run whose machine is lost goes on elsewhere from its copy: `python -m clm mirror`, in processes of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clm.__main__ import main
from clm.mirror import LISTING, mirror_run, restore_run

from .conftest import losses
from .test_resume import kill_after_step, start


def mirror(*arguments: str | Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "clm", "mirror", *map(str, arguments)], stdout=subprocess.PIPE)


def listed(place: Path) -> dict:
    return json.loads((place / LISTING).read_text())["folders"] if (place / LISTING).exists() else {}


@pytest.mark.slow
def test_a_run_goes_on_from_its_copy_after_its_disk_is_gone(train, recipe, tmp_path):
    whole = train("run.retention={last: 2}", name="whole")
    run, place = tmp_path / "runs" / "lost", tmp_path / "bucket"
    copier = mirror(run, place, "--every", "0.1")
    process = start(recipe, "training.run_name=lost", "run.retention={last: 2}")
    kill_after_step(process, run, 12)
    copier.terminate()  # copies once more
    said = copier.communicate(timeout=60)[0].decode()
    assert copier.returncode == 0 and "mirror: checkpoint-" in said
    assert "checkpoint-5" in listed(place) or "checkpoint-10" in listed(place)
    shutil.rmtree(run)
    assert main(["mirror", str(run), str(place), "--restore"]) == 0
    train("run.retention={last: 2}", name="lost")
    assert losses(run) == losses(whole)
    assert main(["mirror", str(run), str(place), "--once"]) == 0
    kept = {path.name for path in run.iterdir() if path.is_dir() and path.name.startswith(("checkpoint-", "final"))}
    assert set(listed(place)) == kept and "final" in kept, "what the run no longer keeps is not kept there either"
    assert {path.name for path in place.iterdir() if path.is_dir()} == kept
    assert not list(run.glob(".restoring*"))


@pytest.fixture
def run(tmp_path) -> Path:
    """Files as a run of 20 steps leaves them, final/ not yet written."""
    run = tmp_path / "run"
    for step in (10, 20):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "checkpoint.json").write_text(json.dumps({"step": step}))
        (folder / "model.safetensors").write_bytes(bytes(step))
    (run / "metrics.jsonl").write_text('{"step": 20}\n')
    (run / ".saving" / "checkpoint-30").mkdir(parents=True)
    (run / "STOP").touch()
    return run


def test_what_was_cut_off_on_its_way_is_not_brought_back(run, tmp_path, capsys):
    place = tmp_path / "bucket"
    in_its_way = place / "checkpoint-20" / "model.safetensors"
    in_its_way.mkdir(parents=True)  # no file can be written there
    assert main(["mirror", str(run), str(place), "--once"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert (place / "checkpoint-20" / "checkpoint.json").is_file(), "it broke in the middle of a checkpoint"
    assert set(listed(place)) == {"checkpoint-10"}
    shutil.rmtree(run)
    assert main(["mirror", str(run), str(place), "--restore"]) == 0
    assert {path.name for path in run.iterdir()} == {"checkpoint-10", "metrics.jsonl"}


def test_a_disk_that_is_ahead_is_left_alone(run, tmp_path, capsys):
    place = tmp_path / "bucket"
    assert main(["mirror", str(run), str(place), "--once"]) == 0
    assert not (place / "STOP").exists(), "a request to one process is none to the next"
    (run / "metrics.jsonl").write_text("{}\n")
    assert main(["mirror", str(run), str(place), "--restore"]) == 0
    assert "has all that is in" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == "{}\n"


def test_a_checkpoint_that_was_made_anew_is_copied_anew(run, tmp_path):
    place = tmp_path / "bucket"
    assert main(["mirror", str(run), str(place), "--once"]) == 0
    (run / "checkpoint-20" / "checkpoint.json").write_text('{"step": 20, "again": true}')
    assert main(["mirror", str(run), str(place), "--once"]) == 0
    assert "again" in (place / "checkpoint-20" / "checkpoint.json").read_text()


@pytest.mark.parametrize("place, said", [("nowhere://x/y", "nowhere"), ("adl://x/y", "adlfs")])
def test_a_place_that_cannot_be_used_is_one_message(run, place, said, capsys):
    assert main(["mirror", str(run), place, "--once"]) == 2
    assert said in capsys.readouterr().err


def test_the_copier_ends_by_itself_when_the_run_has_finished(run, tmp_path):
    (run / "final").mkdir()
    (run / "final" / "config.json").write_text("{}")
    copier = mirror(run, tmp_path / "bucket")
    assert copier.wait(timeout=60) == 0
    assert "final" in listed(tmp_path / "bucket")


def test_the_average_of_the_weights_is_copied_and_comes_back_with_final(tmp_path):
    run, back, place = tmp_path / "run", tmp_path / "back", f"file://{tmp_path / 'bucket'}"
    for name in ("final-ema", "final"):
        (run / name).mkdir(parents=True)
        (run / name / "config.json").write_text(name)
    mirror_run(run, place, every=1, is_once=True)
    restore_run(back, place)
    assert [(back / name / "config.json").read_text() for name in ("final-ema", "final")] == ["final-ema", "final"]
