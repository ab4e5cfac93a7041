"""Poisoned data in real runs: what each policy makes of it."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from clm.recipe import load_recipe
from clm.run_folder import list_checkpoints
from clm.spikes import check_policy
from data_prep.errors import UserError

from .conftest import losses, quiet_config, read_metrics
from .poison import BAD, excluded_blocks, final_loss, on, poison, spikes, weights
from .test_launch import BIN, launch

# --- rollback ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logging_steps", [pytest.param(1, marks=pytest.mark.slow), 20])
def test_after_a_rollback_the_loss_is_the_clean_runs_and_the_poison_is_what_was_excluded(
    train, poisoned, prepared, samples_of_step, logging_steps
):
    evaluated = ("training.eval_strategy=steps", "training.eval_steps=60")
    clean = train(*on(prepared.folder, "rollback", *evaluated), name="clean")
    assert not (clean / "events.jsonl").exists() and not (clean / "spikes").exists()
    run = train(*on(poisoned, "rollback", f"training.logging_steps={logging_steps}", *evaluated), name="poisoned")
    assert final_loss(run) == pytest.approx(final_loss(clean), rel=0.01)
    assert excluded_blocks(run) == {b for step in BAD for b in samples_of_step[step].tolist()}
    (event,) = spikes(run, "rollback")
    assert (event["step"], event["last_step"], event["to_step"]) == (41, 42, 40)
    assert event["excluded"] == [[320, 328], [328, 336]]
    steps = [r["step"] for r in read_metrics(run) if "loss" in r]
    assert steps == list(range(logging_steps, 61, logging_steps)), "each step once: the schedule did not move"
    facts = json.loads((run / "checkpoint-60" / "checkpoint.json").read_text())
    assert facts["excluded"] == event["excluded"]
    report = json.loads((run / "spikes" / "step-41" / "report.json").read_text())
    assert [number for _, number in report["blocks"]] == samples_of_step[41].tolist()
    assert (run / "spikes" / "step-41" / "text.html").stat().st_size > 1000
    assert ": 2 steps, 1 rollback that left out 1,024 tokens." in (run / "final" / "README.md").read_text()
    assert "Spikes" not in (clean / "final" / "README.md").read_text()


@pytest.mark.slow
def test_without_a_checkpoint_before_it_the_run_starts_again_without_the_batch(train, poisoned, samples_of_step):
    run = train(*on(poisoned, "rollback", "training.save_strategy=no"))
    (event,) = spikes(run, "rollback")
    assert event["to_step"] == 0
    assert excluded_blocks(run) == {b for step in BAD for b in samples_of_step[step].tolist()}
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == list(range(1, 61))
    assert (run / "final").is_dir()


@pytest.mark.slow
def test_the_same_step_is_not_rolled_back_twice(train, prepared, samples_of_step, tmp_path, capsys):
    # from step 41 on all data is noise: the first steps of it are taken out, then step 41 is bad again
    folder = shutil.copytree(prepared.folder, tmp_path / "noise")
    poison(folder, np.concatenate([samples_of_step[step] for step in range(41, 113)]))
    run = train(*on(folder, "rollback"), "data.tokens=40960")
    (event,) = spikes(run, "rollback")
    assert event["step"] == 41 and len(event["excluded"]) == event["last_step"] - 40
    assert "No rollback: the run went back from step 41 before" in capsys.readouterr().out
    assert (run / "final").is_dir() and (run / "spikes" / "step-41-2" / "report.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("first", [49, 50])
def test_a_burst_is_taken_out_whole_across_a_save(train, prepared, samples_of_step, tmp_path, first):
    folder = shutil.copytree(prepared.folder, tmp_path / "burst")
    poison(folder, np.concatenate([samples_of_step[step] for step in range(first, first + 3)]))
    run = train(*on(folder, "rollback"))
    (event,) = spikes(run, "rollback")
    assert (event["step"], event["last_step"], event["to_step"]) == (first, first + 2, 40)
    assert excluded_blocks(run) == {b for step in range(first, first + 3) for b in samples_of_step[step].tolist()}


@pytest.mark.slow
def test_a_burst_across_the_end_of_a_stage_is_taken_out_in_two_rollbacks(train, poisoned, samples_of_step):
    stages = "data.stages=[{name: a, tokens: 20992}, {name: b, tokens: 9728}]"  # step 41 is the last of stage a
    run = train(*on(poisoned, "rollback", stages, "data.tokens=null"))
    assert [(e["step"], e["last_step"], e["is_over"]) for e in spikes(run, "rollback")] == [
        (41, 41, False),
        (41, 41, False),
    ]
    assert excluded_blocks(run) == {b for step in BAD for b in samples_of_step[step].tolist()}
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == list(range(1, 61))


@pytest.mark.slow
def test_there_are_at_most_max_rollbacks(train, prepared, samples_of_step, tmp_path, capsys):
    folder = shutil.copytree(prepared.folder, tmp_path / "twice")
    poison(folder, np.concatenate([samples_of_step[step] for step in (41, 52)]))
    one = train(*on(folder, "rollback", "run.spikes.max_rollbacks=1"), name="one")
    assert [event["step"] for event in spikes(one, "rollback")] == [41]
    assert "No rollback: run.spikes.max_rollbacks is 1" in capsys.readouterr().out
    two = train(*on(folder, "rollback", "run.spikes.max_rollbacks=2"), name="two")
    assert [event["step"] for event in spikes(two, "rollback")] == [41, 51], "the second lies a step earlier by then"
    assert excluded_blocks(two) == {b for step in (41, 52) for b in samples_of_step[step].tolist()}


def test_no_rollbacks_allowed_is_report_bit_for_bit(train, poisoned):
    report = train(*on(poisoned, "report"), name="report")
    none = train(*on(poisoned, "rollback", "run.spikes.max_rollbacks=0"), name="none")
    assert losses(report) == losses(none)
    assert weights(report / "final") == weights(none / "final")
    assert [r["spikes"] for r in read_metrics(report) if "spikes" in r] == [1, 1]
    for run in (report, none):
        assert [path.name for path in (run / "spikes").iterdir()] == ["step-41"], "one report for steps in a row"


@pytest.mark.slow
def test_log_says_it_and_writes_no_folder(train, poisoned, capsys):
    report = train(*on(poisoned, "report"), name="report")
    only_log = train(*on(poisoned, "log"), name="log")
    assert losses(report) == losses(only_log)
    assert not (only_log / "spikes").exists() and len(spikes(only_log)) == 2
    assert capsys.readouterr().out.count("step 41: loss 7.") == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its CPU communication with c++")
def test_a_rollback_under_deepspeed_takes_out_the_same_blocks(train, recipe, poisoned, samples_of_step):
    pytest.importorskip("deepspeed", exc_type=ImportError)
    quiet = quiet_config(recipe)
    one = train(quiet, *on(poisoned, "rollback"), name="one")
    command = [str(BIN / "accelerate"), "launch", "--quiet", "--config_file", "accelerate_configs/zero2.yaml"]
    command += ["--num_processes", "2", "--main_process_port", "0", "run_clm.py", str(recipe)]
    overrides = [quiet, *on(poisoned, "rollback"), "training.per_device_train_batch_size=8", "training.run_name=two"]
    done = launch(*command, *overrides)
    assert done.returncode == 0, done.stderr
    two = one.with_name("two")
    assert excluded_blocks(two) == {b for step in BAD for b in samples_of_step[step].tolist()}
    assert [r["step"] for r in read_metrics(two) if "loss" in r] == list(range(1, 61))
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)


# --- skip -------------------------------------------------------------------------------------------------------------


def test_skipped_steps_move_nothing_and_the_schedule_goes_on(train, poisoned):
    run = train(*on(poisoned, "skip", "training.save_steps=1", "run.retention={last: 60}"))
    folders = {step: path for step, path in list_checkpoints(run)}
    for name in ("model.safetensors", "optimizer.pt"):
        content = {step: (folders[step] / name).read_bytes() for step in (40, 41, 42, 43)}
        if name == "optimizer.pt":  # it also holds the learning rate, which goes on
            content = {step: moments(folders[step] / name) for step in content}
        assert content[40] == content[41] == content[42] != content[43]
    records = {r["step"]: r for r in read_metrics(run) if "loss" in r}
    assert [records[step].get("skipped_steps") for step in (40, 41, 42, 43)] == [None, [41], [42], None]
    assert records[40]["learning_rate"] > records[41]["learning_rate"] > records[42]["learning_rate"]
    assert records[43]["loss"] < 1.1 * records[40]["loss"]
    assert all(event["is_skipped"] for event in spikes(run))
    assert ": 2 steps, 2 updates skipped." in (run / "final" / "README.md").read_text()


def moments(path: Path) -> str:
    """Both moments and the step counters of a saved optimizer."""
    import torch

    state = torch.load(path, weights_only=True)["state"]
    return hashlib.sha256(str([[t.tolist() for t in each.values()] for each in state.values()]).encode()).hexdigest()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["training.optim=adamw_torch"], "training.optim is adamw_torch, which has no gate on the device"),
        (["training.optim=adafactor"], "Use adamw_torch_fused"),
        (["training.deepspeed=ds_configs/zero2.json"], "DeepSpeed makes the update"),
    ],
)
def test_skip_is_refused_where_there_is_no_gate(train, overrides, reason):
    with pytest.raises(UserError, match=f"run.spikes.policy is skip but .*{reason}"):
        train("run.spikes.policy=skip", *overrides)


def test_skip_is_refused_in_fp16_whose_loss_scaling_has_the_same_gate(recipe):
    checked = load_recipe(recipe, ["run.spikes.policy=skip"])
    check_policy(checked, {}, "fp16")
    assert any("the precision is fp16" in message for message in checked.problems.messages)
    assert not load_recipe(recipe, ["run.spikes.policy=rollback"]).problems.messages


@pytest.mark.parametrize("policy", ["skip", pytest.param("rollback", marks=pytest.mark.slow)])
def test_nothing_waits_for_the_device_between_two_log_points(train, poisoned, policy):
    import traceback

    from torch.utils._python_dispatch import TorchDispatchMode

    reads = []

    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_local_scalar_dense" in str(function) or "nonzero" in str(function):  # .item(), bool(), masks
                reads.extend(f.name for f in traceback.extract_stack() if "clm/spike" in f.filename)
            return function(*args, **(kwargs or {}))

    with Watcher():
        train(*on(poisoned, policy, "training.logging_steps=20"))
    assert set(reads) == {"state"}, "only a checkpoint reads single numbers"


# --- a loss that is no number -----------------------------------------------------------------------------------------


@pytest.fixture
def broken(recipe, prepared, samples_of_step, tmp_path) -> list[str]:
    """Overrides for a model that has one embedding of NaN, and data that has this token in the batch of step 8."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from .conftest import CONFIG

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, "tie_word_embeddings": False}))
    unused = 2  # [PAD]
    with torch.no_grad():
        model.model.embed_tokens.weight[unused] = torch.nan
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(prepared.folder / "tokenizer").save_pretrained(tmp_path / "base")
    folder = shutil.copytree(prepared.folder, tmp_path / "data" / "tiny")
    poison(folder, samples_of_step[8][:1], token=unused)
    quick = ["run.preflight=false", "training.eval_strategy=no"]
    return [f"data.mixture=[{{dataset: {folder}}}]", "model.config=null", f"model.init={tmp_path / 'base'}", *quick]


@pytest.mark.parametrize("logging_steps", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_a_loss_that_is_no_number_ends_a_reported_run_and_not_the_others(train, broken, logging_steps):
    log = f"training.logging_steps={logging_steps}"
    with pytest.raises(UserError, match=r"the loss is nan at step 8\..*shown in .*spikes/step-8\."):
        train(*broken, log, name="report")
    run = Path(os.environ["RUNS_DIR"]) / "report"
    assert [step for step, _ in list_checkpoints(run)] == [5], "weights that are lost are not saved"

    run = train(*broken, log, "run.spikes.policy=skip", name="skip")
    records = [r for r in read_metrics(run) if "loss" in r]
    assert [r["step"] for r in records if not np.isfinite(r["loss"])] == ([8] if logging_steps == 1 else [])
    assert [r["skipped_steps"] for r in records if "skipped_steps" in r] == [[8]]

    run = train(*broken, log, "run.spikes.policy=rollback", name="rollback")
    (event,) = spikes(run, "rollback")
    assert (event["step"], event["last_step"], event["to_step"], event["excluded"]) == (8, 8, 5, [[56, 64]])
    assert all(np.isfinite(r["loss"]) for r in read_metrics(run) if "loss" in r)


@pytest.mark.slow
def test_after_a_broken_run_the_policy_may_change_and_the_run_goes_on(train, broken):
    with pytest.raises(UserError, match="run.spikes.policy=rollback goes on from the newest one"):
        train(*broken)
    run = train(*broken, "run.spikes.policy=rollback")
    assert (run / "final").is_dir() and spikes(run, "rollback")[0]["to_step"] == 5


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [pytest.param("report", marks=pytest.mark.slow), "skip"])
def test_a_resumed_run_judges_as_an_uninterrupted_one(train, poisoned, policy):
    overrides = on(poisoned, policy, "training.logging_steps=4", "run.retention={last: 9}")
    straight = train(*overrides, name="straight")
    run = Path(shutil.copytree(straight, straight.with_name("resumed")))
    shutil.rmtree(run / "final")
    (run / "events.jsonl").unlink()
    for step in (40, 50, 60):
        shutil.rmtree(run / f"checkpoint-{step}")
    train(*overrides, name="resumed")  # from step 30: without its history step 41 would pass for a beginning
    assert losses(run) == losses(straight)
    assert [e["reason"] for e in spikes(run)] == [e["reason"] for e in spikes(straight)] != []
    assert weights(run / "final") == weights(straight / "final")


@pytest.mark.slow
def test_few_log_points_and_a_full_buffer_change_nothing(train, poisoned, monkeypatch):
    often = train(*on(poisoned, "report"), name="often")
    monkeypatch.setattr("clm.spikes.RING", 7)
    rarely = train(*on(poisoned, "report", "training.logging_steps=60", "training.save_steps=60"), name="rarely")
    assert [e["step"] for e in spikes(often)] == [41, 42], "looked at one by one"
    assert [(e["step"], e["last_step"]) for e in spikes(rarely)] == [(41, 42)]
    assert spikes(rarely)[0]["reason"] == spikes(often)[0]["reason"]
    assert weights(rarely / "final") == weights(often / "final")
