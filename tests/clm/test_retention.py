import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clm.events import append_event
from clm.recipe_sections import Retention
from clm.retention import Saved, apply_retention, choose, count_kept, reduce_to_weights
from clm.run_folder import list_checkpoints, list_weights, model_folder
from data_prep.errors import UserError

TOKENS = 100  # of a step

retentions = st.builds(
    Retention,
    last=st.integers(0, 4),
    best=st.integers(0, 3),
    every_tokens=st.none() | st.integers(50, 900),
    weights=st.sampled_from(["none", "all"]) | st.integers(0, 4),
)
losses = st.none() | st.sampled_from([1.0, 2.0, 3.0, float("nan")]) | st.floats(0, 10)
# the steps at which a run saves, and the loss that was evaluated there
histories = st.dictionaries(st.integers(1, 60), losses, min_size=1, max_size=25)


def carry_out(there: set[Saved], retention: Retention, is_finished: bool = False) -> set[Saved]:
    choice = choose(there, retention, is_finished)
    assert choice.keep | choice.reduce | choice.delete == there
    assert not choice.keep & choice.reduce and not (choice.keep | choice.reduce) & choice.delete
    weights = {Saved(c.step, c.tokens, False, c.eval_loss) for c in choice.reduce}
    return choice.keep | weights


@settings(max_examples=300, deadline=None)
@given(histories, retentions)
def test_the_newest_the_best_and_the_milestones_outlive_every_rotation(history, retention):
    there: set[Saved] = set()
    seen: list[Saved] = []
    for step in sorted(history):
        new = Saved(step, step * TOKENS, True, history[step])
        seen.append(new)
        there = carry_out(there | {new}, retention)
        assert carry_out(there, retention) == there, "choosing again changes nothing"
        assert new in there, "the newest stays, and stays full"
        assert set(seen[-max(1, retention.last) :]) <= there
        evaluated = [c for c in seen if c.eval_loss is not None and c.eval_loss == c.eval_loss]
        assert set(sorted(evaluated, key=lambda c: (c.eval_loss, c.step))[: retention.best]) <= there
        if retention.every_tokens:
            for multiple in range(retention.every_tokens, step * TOKENS + 1, retention.every_tokens):
                assert next(c for c in seen if c.tokens >= multiple) in there
        most_full, most_weights = count_kept(retention, len(seen), step * TOKENS)
        assert sum(3 if c.is_full else 1 for c in there) <= 3 * most_full + most_weights, "what the preflight asks for"
        if retention.weights == "all":
            assert {c.step for c in there} == set(sorted(history)[: len(seen)])
    done = carry_out(there, retention, is_finished=True)
    assert seen[-1].step in {c.step for c in done}, "also at the end the newest is there"
    assert carry_out(done, retention, is_finished=True) == done


@settings(max_examples=200, deadline=None)
@given(st.sets(st.builds(Saved, st.integers(1, 20), st.just(0), st.booleans()), min_size=1), retentions)
def test_weights_beside_their_full_checkpoint_are_a_deletion_that_was_interrupted(there, retention):
    there = {Saved(c.step, c.step * TOKENS, c.is_full) for c in there}
    done = carry_out(there, retention)
    steps = [c.step for c in done]
    assert len(steps) == len(set(steps))
    assert max(c.step for c in there) in steps
    assert carry_out(done, retention) == done


def test_the_example_of_the_module():
    there = {Saved(s, s * 4, True, loss) for s, loss in zip(range(1, 7), [3.0, 1.0, 2.0, 2.0, 2.0, 2.0], strict=True)}
    choice = choose(there, Retention(last=2, best=1, every_tokens=10, weights="all"))
    assert [c.step for c in sorted(choice.keep)] == [2, 3, 5, 6]
    assert [c.step for c in sorted(choice.reduce)] == [1, 4]


def test_with_last_0_the_newest_stays_resumable_until_the_run_is_finished():
    retention = Retention(last=0, weights="all")
    there = {Saved(1, 100, True), Saved(2, 200, True)}
    assert [c.step for c in choose(there, retention).reduce] == [1]
    assert {c.step for c in choose(there, retention, is_finished=True).reduce} == {1, 2}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
    return tmp_path


def write_checkpoint(run: Path, step: int, **facts) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "global_step1").mkdir(parents=True)
    files = ["model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "environment.txt", "optimizer.pt"]
    files += ["scheduler.pt", "rng_state_0.pth", "trainer_state.json", "global_step1/x.pt", "latest"]
    for name in files:
        (folder / name).write_text(name)
    manifest = {"step": step, "tokens": step * TOKENS, "eval_loss": None, "files": {n: {} for n in files}, **facts}
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    return folder


def test_reducing_leaves_a_model_in_hub_format_and_nothing_of_the_resume(run):
    inode = (run / "checkpoint-10" / "model.safetensors").stat().st_ino
    folder = reduce_to_weights(run / "checkpoint-10")
    names = {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "environment.txt"}
    assert {p.name for p in folder.iterdir()} == names | {"weights.json"}
    assert (folder / "model.safetensors").stat().st_ino == inode, "nothing was copied"
    facts = json.loads((folder / "weights.json").read_text())
    assert (facts["step"], facts["tokens"], set(facts["files"])) == (10, 1000, names)
    assert list_checkpoints(run) == [(20, run / "checkpoint-20")] and list_weights(run) == [(10, folder)]
    assert model_folder(run, 10) == folder and model_folder(run, 20) == run / "checkpoint-20"
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint-20", "weights-10"]


def test_a_reduction_that_was_killed_before_the_full_one_was_deleted_is_finished(run):
    twin = run / "checkpoint-10"
    copy = {p.name: p.read_bytes() for p in twin.iterdir() if p.is_file()}
    reduce_to_weights(twin)
    twin.mkdir()
    for name, content in copy.items():
        (twin / name).write_bytes(content)
    apply_retention(run, Retention(last=1, weights="all"), 20)
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint-20", "weights-10"]


def test_a_sharded_checkpoint_is_not_reduced(run):
    folder = write_checkpoint(run, 5)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    del manifest["files"]["model.safetensors"]
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="kept in full"):
        reduce_to_weights(folder)
    assert (folder / "optimizer.pt").is_file()


def test_checkpoints_that_a_rollback_left_behind_are_deleted_and_do_not_push_out_good_ones(run):
    write_checkpoint(run, 30)
    append_event(run, {"event": "rollback", "step": 15, "last_step": 16, "to_step": 10, "excluded": [[56, 64]]})
    write_checkpoint(run, 12, excluded=[[56, 64]])
    apply_retention(run, Retention(last=2), 12)
    assert [step for step, _ in list_checkpoints(run)] == [10, 12]


def test_a_damaged_manifest_is_left_to_the_next_start(run):
    (run / "checkpoint-10" / "checkpoint.json").write_text("{")
    apply_retention(run, Retention(last=1), 20)
    assert [step for step, _ in list_checkpoints(run)] == [10, 20]


def test_what_lies_ahead_of_the_training_was_damaged_and_counts_only_when_it_is_passed(run):
    write_checkpoint(run, 30)
    apply_retention(run, Retention(last=1), 20)
    assert [step for step, _ in list_checkpoints(run)] == [20, 30]
    write_checkpoint(run, 40)
    apply_retention(run, Retention(last=1), 40)
    assert [step for step, _ in list_checkpoints(run)] == [40]
