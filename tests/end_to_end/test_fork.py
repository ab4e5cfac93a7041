"""A run made longer and a model annealed off a run: the batches and the curve up to there stay what they were."""

import json
import os
from pathlib import Path

import pytest

import run_clm
from clm.events import read_events
from clm.fork import anneal_run, extend_run
from clm.replay import open_replay
from clm.run_folder import list_checkpoints
from data_prep.errors import UserError

from .conftest import losses, read_metrics

STABLE = (
    "training.lr_scheduler_type=warmup_stable_decay",
    "training.lr_scheduler_kwargs={num_decay_steps: 4, min_lr_ratio: 0.1}",
    "training.warmup_steps=2",
    "run.retention={last: 9}",
)


def start_record(run: Path) -> None:
    """What `make train RECIPE=runs/x/recipe.yaml` starts."""
    run_clm.main([str(run / "recipe.yaml")])


@pytest.mark.slow
def test_a_run_extended_before_its_decay_is_the_longer_run(train):
    longer = train(*STABLE, "data.tokens=15_360", name="longer")
    run = train(*STABLE, name="short")
    said = extend_run("short", 15_360, 15)
    assert "10,240 -> 15,360 tokens, 20 -> 30 steps, from checkpoint-15" in said and "jumps" not in said
    assert not (run / "final").exists() and (run / "before-extension-1" / "checkpoint-20").is_dir()
    start_record(run)
    assert losses(run) == losses(longer)
    assert (run / "final" / "model.safetensors").read_bytes() == (longer / "final" / "model.safetensors").read_bytes()
    assert [e["event"] for e in read_events(run)] == ["extended"]
    with pytest.raises(UserError, match=r"data.tokens: 15360 in the run, 10240"):
        train(*STABLE, name="short")


def test_extending_a_cosine_says_that_the_rate_jumps_and_uses_the_new_one_at_once(train):
    run = train(name="cosine")
    said = extend_run("cosine", 20_480, None)
    assert "The learning rate jumps from 0.001" in said and "at step 21" in said
    start_record(run)
    rates = {r["step"]: r["learning_rate"] for r in read_metrics(run) if "loss" in r}
    assert rates[20] < 0.0012 and rates[21] > 0.005, "the first step has the new rate already"
    assert sorted(rates) == list(range(1, 41))


@pytest.mark.parametrize(
    "tokens, step, expected",
    [(20_000, 7, "no checkpoint of step 7. It has 5, 10"), (5_000, None, "has trained on 10,240")],
)
def test_an_extension_that_cannot_be_is_refused_and_nothing_is_moved(train, tokens, step, expected):
    run = train("run.retention={last: 9}")
    with pytest.raises(UserError, match=expected):
        extend_run("tiny", tokens, step)
    assert (run / "final").is_dir() and len(list_checkpoints(run)) == 4
    with pytest.raises(UserError, match="this run does not exist"):
        extend_run("tiney", 10**6, None)


def test_an_annealed_run_begins_as_the_trunk_and_cools_down_on_its_own_data(train, second_dataset):
    trunk = train("training.lr_scheduler_type=constant_with_warmup", "run.retention={last: 9}", name="trunk")
    before = {p.name: p.read_bytes() for p in (trunk / "checkpoint-15").iterdir() if p.is_file()}
    said = anneal_run(str(trunk / "checkpoint-15"), 2_560, str(second_dataset), None)
    run = Path(os.environ["RUNS_DIR"]) / "trunk-anneal-15"
    assert f"make train RECIPE={run}/recipe.yaml" in said and "not constant" not in said
    start_record(run)
    records = read_metrics(run)
    rates = {r["step"]: r["learning_rate"] for r in records if "loss" in r}
    assert sorted(rates) == list(range(1, 21))
    assert {s: x for s, x in losses(run).items() if s <= 15} == {s: x for s, x in losses(trunk).items() if s <= 15}
    assert rates[15] == rates[16] > rates[17] > rates[20] > 0
    replay, old = open_replay(run), open_replay(trunk)
    for step in range(1, 16):
        assert [x.tolist() for x in replay.blocks_of_step(step)] == [x.tolist() for x in old.blocks_of_step(step)]
    for step in range(16, 21):
        assert set(replay.blocks_of_step(step)[1].tolist()) == {1} and replay.dataset_names[1] == str(second_dataset)
    assert (read_events(run)[0]["event"], read_events(run)[0]["from"]) == ("forked", str(trunk))
    assert (read_events(trunk)[0]["event"], read_events(trunk)[0]["to"]) == ("fork", str(run))
    assert {p.name: p.read_bytes() for p in (trunk / "checkpoint-15").iterdir() if p.is_file()} == before
    assert "from step 15 of trunk" in (run / "final" / "README.md").read_text()
    with pytest.raises(UserError, match="exists already"):
        anneal_run(str(trunk / "checkpoint-15"), 2_560, None, None)


def test_annealing_off_a_falling_rate_is_said_and_a_damaged_checkpoint_refused(train):
    trunk = train("run.retention={last: 9}", name="trunk")
    assert "is not constant at step 10" in anneal_run(str(trunk / "checkpoint-10"), 1_024, None, "child")
    (trunk / "checkpoint-5" / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="optimizer.pt has 1 bytes"):
        anneal_run(str(trunk / "checkpoint-5"), 1_024, None, None)
    with pytest.raises(UserError, match="is no complete checkpoint. .*checkpoint-5, checkpoint-10"):
        anneal_run(str(trunk / "checkpoint-7"), 1_024, None, None)
    assert not (trunk.parent / "trunk-anneal-5").exists()


def test_allowed_changes_go_on_from_the_checkpoint_and_are_written_down(train):
    run = train(name="changed")
    (run / "final").rename(run / "gone")
    with pytest.raises(UserError, match="--allow-changes"):
        train("training.weight_decay=0.3", name="changed")
    train("training.weight_decay=0.3", "--allow-changes", name="changed")
    events = read_events(run)
    assert [e["event"] for e in events] == ["changed"] and "training.weight_decay" in json.dumps(events)
    assert (run / "final").is_dir()
    train("training.weight_decay=0.3", name="changed")  # it is the run's recipe now
