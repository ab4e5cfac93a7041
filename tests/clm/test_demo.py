from pathlib import Path

import pytest

from clm.demo import describe_evaluations, show_run
from data_prep.errors import UserError


def test_the_demo_shows_evaluation_samples_yardstick_reload_and_what_comes_next(run_copy, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # for the fresh process that it starts
    assert show_run(str(run_copy)) == 0
    out = capfd.readouterr().out
    titles = [line.split()[1] for line in out.splitlines() if line.startswith("== ")]
    assert titles == ["Evaluation", "Three", "Yardstick", "Loaded", "Next"]
    assert out.count("--- ") == 3 and "reload: the same model" in out
    assert str(run_copy / "final") in out and str(run_copy / "curve.svg") in out
    assert "make prep DATASET=fineweb" in out and "make train RECIPE=recipes/llama_170m.yaml" in out


def test_the_first_and_the_last_evaluation_are_shown(small_run):
    lines = describe_evaluations(small_run).splitlines()
    assert len(lines) == 3 and "6,400 tokens" in lines[0]
    assert lines[1].startswith("step      0: validation loss 5.9000") and lines[2].startswith("step     10: validation")


def test_a_run_that_has_not_finished_is_told_to_continue(run_copy):
    (run_copy / "final").rename(run_copy / "elsewhere")
    with pytest.raises(UserError, match="has not finished. The command that began it continues it"):
        show_run(str(run_copy))
