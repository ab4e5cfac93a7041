"""The moving average of the weights: it is its formula, changes nothing, resumes bit by bit, and ends as a model."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model

import run_clm
from clm.checkpoint import find_damage
from clm.ema import Ema
from clm.fork import anneal_run, extend_run
from clm.run_folder import list_weights
from data_prep.errors import UserError

from .conftest import losses, quiet_config, read_metrics
from .poison import on, spikes
from .test_launch import TORCHRUN, launch
from .test_speed import MIXTRAL

EMA = ("run.ema={decay: 0.9}", "training.save_steps=1", "run.retention={last: 99}")


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def averages_of(run):
    return [r["eval_ema_loss"] for r in read_metrics(run) if "eval_ema_loss" in r]


def test_the_model_has_the_average_for_a_while_and_then_its_own_weights_bit_by_bit():
    model = make_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    ema, first = Ema(model, 0.5), {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    ema.on_step_end(None, SimpleNamespace(global_step=100), None)  # decay 0.5: (1 + 100) / (10 + 100) is above it
    now = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError), ema.in_place():
        assert all(torch.allclose(value, first[name] + 0.5, atol=1e-6) for name, value in model.state_dict().items())
        raise RuntimeError("an evaluation that fails")
    assert_equal(model.state_dict(), now)
    assert ema.state().keys() == now.keys()
    assert ema.state()["lm_head.weight"] is ema.state()["model.embed_tokens.weight"], "tied ones are one tensor"


@pytest.mark.slow
def test_the_average_is_its_formula_and_training_is_not_changed(train):
    short = ("data.tokens=5120", "training.eval_steps=5")  # 10 steps
    plain = train(*short, name="plain")
    run = train(*short, *EMA, name="ema")
    assert losses(run) == losses(plain), "bit for bit"
    assert_equal(weights(run / "final"), weights(plain / "final"))
    evaluations = [[r["eval_loss"] for r in read_metrics(each) if "eval_loss" in r] for each in (run, plain)]
    assert evaluations[0] == evaluations[1]

    average = weights(run / "checkpoint-1" / "ema")
    assert_equal(average, weights(run / "checkpoint-1"))  # the warm-up begins at 0: still the first weights
    for step in range(2, 11):
        decay = min(0.9, (1 + step) / (10 + step))
        now = weights(run / f"checkpoint-{step}")
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
        kept = weights(run / f"checkpoint-{step}" / "ema")
        assert all(torch.allclose(kept[name], average[name], rtol=0, atol=1e-7 * step) for name in now), step
    assert_equal(weights(run / "final-ema"), weights(run / "checkpoint-10" / "ema"))
    before, *after = averages_of(run)
    assert before == evaluations[0][0] and after[-1] != evaluations[0][-1]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_average_of_an_uninterrupted_one_and_both_are_models(train, run_cli, recipe):
    from transformers import AutoModelForCausalLM

    short = ("data.tokens=5120", "run.ema={decay: 0.9}", "run.retention={last: 1, weights: all}")
    straight = train(*short, name="straight")
    run = train(*short, "run.retention={last: 9}", name="killed")
    for name in ("final", "final-ema", "checkpoint-10"):
        (run / name).rename(run / f"gone-{name}")
    shutil.copytree(run / "gone-final-ema", run / "final-ema")  # killed between final-ema/ and final/
    train(*short, "run.retention={last: 9}", name="killed")
    assert losses(run) == losses(straight) and averages_of(run) == averages_of(straight)
    assert_equal(weights(run / "final-ema"), weights(straight / "final-ema"))
    assert find_damage(run / "checkpoint-10") is None

    (_, reduced), *_ = list_weights(straight)
    assert (reduced / "ema" / "model.safetensors").is_file(), "kept with the weights"
    done = run_cli(["-m", "clm", "export", "straight", "--ema", "--checkpoint", "5"])
    assert done.code == 0 and "same numbers" in done.stdout, done.stderr
    exported = AutoModelForCausalLM.from_pretrained(straight / "export-ema" / "lm")
    of_checkpoint = weights(reduced / "ema")
    assert all(torch.equal(exported.state_dict()[name], of_checkpoint[name]) for name in of_checkpoint)
    card = (straight / "final-ema" / "README.md").read_text()
    assert "exponential moving average" in card and f"{averages_of(straight)[-1]:.4f}" in card
    assert json.loads((straight / "final-ema" / "config.json").read_text())["model_type"] == "llama"
    (straight / "final-ema").rename(straight / "gone")
    done = run_cli(["-m", "clm", "export", "straight", "--ema"])
    assert done.code == 2 and "final-ema: does not exist" in done.stderr


@pytest.mark.slow
def test_a_mixture_of_experts_and_its_average_are_resumed_bit_by_bit(train, tmp_path):
    config = tmp_path / "mixtral.json"  # whose experts are fused in memory and single in the files
    config.write_text(json.dumps(MIXTRAL))
    short = (f"model.config={config}", "data.tokens=5120", "run.ema={decay: 0.9}", "run.retention={last: 9}")
    straight = train(*short, name="straight")
    run = train(*short, name="killed")
    for name in ("final", "final-ema", "checkpoint-10"):
        (run / name).rename(run / f"gone-{name}")
    train(*short, name="killed")
    assert losses(run) == losses(straight)
    for name in ("final", "final-ema"):
        assert_equal(weights(run / name), weights(straight / name))


@pytest.mark.slow
def test_two_processes_and_stages_have_the_average_of_one_run(train, recipe, staged):
    quiet = quiet_config(recipe)
    short = (quiet, "data.tokens=5120", "run.ema={decay: 0.9}")
    one = train(*short, name="one")
    done = launch(*TORCHRUN, "run_clm.py", str(recipe), *short, "training.run_name=two")
    assert done.returncode == 0, done.stderr
    two = one.with_name("two")
    assert averages_of(two) == pytest.approx(averages_of(one), rel=1e-5)
    a, b = (weights(run / "final-ema") for run in (one, two))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)

    some = (*staged, quiet, "run.ema={decay: 0.9}", "run.retention={last: 9}", "training.eval_steps=11")
    straight = train(*some, name="straight")
    again = train(*some, name="again")
    for name in ("checkpoint-20", "checkpoint-22", "final", "final-ema"):  # on from within the second stage
        (again / name).rename(again / f"gone-{name}")
    train(*some, name="again")
    assert_equal(weights(again / "final-ema"), weights(straight / "final-ema"))
    assert averages_of(again) == averages_of(straight)


def test_what_cannot_be_averaged_is_refused(train, monkeypatch, prepared):
    cases = [(["run.ema={decay: 1.5}"], "run.ema.decay is 1.5 but must be below 1")]
    cases += [(["run.ema={decay: 0.9}", "training.optim=schedule_free_adamw"], "averages its weights itself")]
    for overrides, text in cases:
        with pytest.raises(UserError, match=text):
            train(*overrides)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="run.ema is set but the weights are divided among processes"):
        train("run.ema={decay: 0.9}")


def assert_average_of(run, first, last, decay=0.9):
    """ema/ of a checkpoint is the formula over the weights of the steps after `first`, whose average is given."""
    average = weights(run / f"checkpoint-{first}" / "ema")
    for step in range(first + 1, last + 1):
        share = min(decay, (1 + step) / (10 + step))
        now = weights(run / f"checkpoint-{step}")
        average = {name: share * average[name] + (1 - share) * now[name] for name in now}
    kept = weights(run / f"checkpoint-{last}" / "ema")
    assert all(torch.allclose(kept[name], average[name], rtol=0, atol=1e-7 * (last - first)) for name in kept)


@pytest.mark.slow
def test_after_a_rollback_the_average_knows_nothing_of_the_steps_that_were_taken_back(train, poisoned):
    run = train(*on(poisoned, "rollback", *EMA, "training.save_steps=1"))
    (event,) = spikes(run, "rollback")
    assert (event["step"], event["last_step"], event["to_step"]) == (41, 42, 40)
    assert_average_of(run, 1, 60)
    assert_equal(weights(run / "final-ema"), weights(run / "checkpoint-60" / "ema"))


@pytest.mark.slow
def test_an_annealed_and_an_extended_run_go_on_with_the_average_of_their_trunk(train):
    constant = ["training.lr_scheduler_type=constant_with_warmup", "training.lr_scheduler_kwargs=null"]
    constant += ["training.warmup_steps=1"]
    trunk = train(*EMA, *constant, "data.tokens=5120", name="trunk")
    straight = train(*EMA, *constant, "data.tokens=7680", name="straight")
    anneal_run(str(trunk / "checkpoint-8"), 2_048, None, None)
    annealed = trunk.with_name("trunk-anneal-8")
    run_clm.main([str(annealed / "recipe.yaml")])
    assert_equal(weights(annealed / "checkpoint-8" / "ema"), weights(trunk / "checkpoint-8" / "ema"))
    assert_average_of(annealed, 8, 12)
    assert_equal(weights(annealed / "final-ema"), weights(annealed / "checkpoint-12" / "ema"))
    extend_run("trunk", 7_680, None)
    assert not (trunk / "final-ema").exists()
    run_clm.main([str(trunk / "recipe.yaml")])
    assert losses(trunk) == losses(straight)
    assert_equal(weights(trunk / "final-ema"), weights(straight / "final-ema"))


@pytest.mark.slow
def test_a_run_that_gets_an_average_later_begins_it_with_the_weights_of_its_checkpoint(train, capsys):
    run = train("data.tokens=3072", "training.save_steps=1", "run.retention={last: 99}", name="late")
    (run / "final").rename(run / "gone")
    for step in (5, 6):
        (run / f"checkpoint-{step}").rename(run / f"gone-{step}")
    train("data.tokens=3072", *EMA, "--allow-changes", name="late")
    assert "has no average of its weights: run.ema begins there" in capsys.readouterr().out
    before, now = weights(run / "checkpoint-4"), weights(run / "checkpoint-5")
    share = (1 + 5) / (10 + 5)
    kept = weights(run / "checkpoint-5" / "ema")
    assert all(torch.allclose(kept[n], share * before[n] + (1 - share) * now[n], rtol=0, atol=1e-6) for n in now)
