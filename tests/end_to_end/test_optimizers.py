"""Optimizers of a recipe: they train, resume bit by bit, and do not depend on how the batch is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from clm.recipe import load_recipe
from data_prep.errors import UserError

from .conftest import losses, quiet_config, read_metrics
from .test_launch import TORCHRUN, launch

MUON = ("run.optimizer=muon", "run.muon.learning_rate=0.01", "training.learning_rate=3e-3")
CASES = {
    "muon": MUON,
    "muon_like_adamw": (*MUON, "run.muon.adjust=match_rms_adamw", "training.optim=adamw_torch"),
    "bitsandbytes 8 bit": ("training.optim=adamw_bnb_8bit",),
}
NEEDS = {"bnb": "bitsandbytes", "lion": "bitsandbytes", "torch_": "torchao", "schedule_free": "schedulefree"}
NAMES = ("lion_32bit", "lion_8bit", "adamw_torch_8bit", "adamw_torch_4bit")
NAMES += ("schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam")


def weights(run):
    return (run / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(train, overrides):
    if "bnb" in overrides[0]:
        pytest.importorskip("bitsandbytes")
    short = (*overrides, "data.tokens=5120", "data.validation=[]")
    straight = train(*short, name="straight")
    run = train(*short, "run.retention={last: 9}", name="resumed")
    (run / "final").rename(run / "gone")
    (run / "checkpoint-10").rename(run / "gone-10")
    train(*short, "run.retention={last: 9}", name="resumed")
    assert losses(run) == losses(straight) and weights(run) == weights(straight)
    assert losses(run)[10] < losses(run)[1] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_by_trainers_name_learns_resumes_bit_by_bit_and_decays_matrices_only(train, name):
    pytest.importorskip(next(package for part, package in NEEDS.items() if part in name))
    rate = {"lion_32bit": 2e-3, "lion_8bit": 2e-3, "schedule_free_sgd": 2.0, "schedule_free_radam": 0.1}.get(name, 1e-2)
    short = [f"training.optim={name}", f"training.learning_rate={rate}", "training.weight_decay=0.01"]
    short += ["data.tokens=5120", "run.retention={last: 9}"]
    if name.startswith("schedule_free"):
        short += ["training.lr_scheduler_type=constant", "training.lr_scheduler_kwargs=null"]
        short += ["training.warmup_steps=0"] if name.endswith("radam") else []
    straight = train(*short, name="straight")
    run = train(*short, name="resumed")
    (run / "final").rename(run / "gone")
    (run / "checkpoint-10").rename(run / "gone-10")
    train(*short, name="resumed")
    assert losses(run) == losses(straight) and weights(run) == weights(straight)
    assert [r["eval_loss"] for r in read_metrics(run) if "eval_loss" in r][-1] < losses(run)[1] - 0.3
    groups = torch.load(run / "checkpoint-10" / "optimizer.pt", weights_only=False)["param_groups"]
    # 2 x 7 matrices and the tied embedding; 2 x 2 + 1 norms
    assert [(len(group["params"]), float(group["weight_decay"])) for group in groups] == [(15, 0.01), (5, 0.0)]


@pytest.mark.slow
def test_a_schedule_free_run_is_evaluated_saved_and_ended_with_its_mean_and_trained_without(train, run_cli, recipe):
    pytest.importorskip("schedulefree")
    short = ["training.optim=schedule_free_adamw", "training.lr_scheduler_type=constant", "data.tokens=5120"]
    short += ["training.lr_scheduler_kwargs=null", "training.warmup_steps=0.2", quiet_config(recipe)]
    often = train(*short, "training.eval_steps=1", "training.save_steps=1", name="often")
    seldom = train(*short, "training.eval_steps=10", name="seldom")
    assert losses(often) == losses(seldom), "bit for bit, however often it was evaluated and saved"
    assert weights(often) == weights(seldom)
    checkpoint = seldom / "checkpoint-10"
    used, trained = load_file(checkpoint / "model.safetensors"), torch.load(checkpoint / "training_weights.pt")
    final = load_file(seldom / "final" / "model.safetensors")
    assert all(np.array_equal(used[name], final[name]) for name in final)
    assert any(not np.array_equal(used[name], trained[name].numpy()) for name in final)
    optimizer = torch.load(checkpoint / "optimizer.pt")
    assert optimizer["param_groups"][0]["warmup_steps"] == 2 and optimizer["param_groups"][0]["train_mode"]
    done = run_cli(["-m", "clm", "reload", "seldom"])
    assert done.code == 0 and "reload: the same model" in done.stdout, "the evaluated model is that of final/"
    two = launch(*TORCHRUN, "run_clm.py", str(recipe), *short, "training.run_name=two")
    assert two.returncode == 0, two.stderr
    assert np.allclose(list(losses(seldom).values()), list(losses(seldom.with_name("two")).values()), rtol=1e-4)


def test_muon_trains_the_same_however_the_batch_is_cut(train, recipe):
    short = (*MUON, quiet_config(recipe), "data.tokens=3072", "data.validation=[]")
    one = train(*short, "training.per_device_train_batch_size=16", name="one")
    four = train(*short, "training.per_device_train_batch_size=4", name="four")
    assert np.allclose(list(losses(one).values()), list(losses(four).values()), rtol=1e-3)  # bf16 in its iteration
    optimizer = torch.load(one / "checkpoint-5" / "optimizer.pt")
    rates = [group["lr"] / group["initial_lr"] for group in optimizer["param_groups"]]
    assert rates[0] == pytest.approx(rates[-1]) and optimizer["param_groups"][-1]["initial_lr"] == 0.01


@pytest.mark.slow
def test_the_z_loss_on_two_processes_is_that_of_one(train, recipe):
    short = (quiet_config(recipe), "data.tokens=2048", "data.validation=[]", "run.z_loss=0.01")
    one = train(*short, name="one")
    done = launch(*TORCHRUN, "run_clm.py", str(recipe), *short, "training.run_name=two")
    assert done.returncode == 0, done.stderr
    records = [[r for r in read_metrics(run) if "loss" in r] for run in (one, one.with_name("two"))]
    for name in ("loss", "z_loss", "grad_norm"):
        assert [r[name] for r in records[0]] == pytest.approx([r[name] for r in records[1]], rel=1e-5), name


@pytest.mark.slow
def test_muon_on_two_processes_trains_as_on_one(train, recipe):
    short = (*MUON, quiet_config(recipe), "data.tokens=5120", "data.validation=[]")
    one = train(*short, name="one")
    done = launch(*TORCHRUN, "run_clm.py", str(recipe), *short, "training.run_name=two")
    assert done.returncode == 0, done.stderr
    two = one.with_name("two")
    assert np.allclose(list(losses(one).values()), list(losses(two).values()), rtol=1e-3)
    a, b = (load_file(run / "final" / "model.safetensors") for run in (one, two))
    assert all(np.linalg.norm(a[name] - b[name]) <= 0.02 * np.linalg.norm(a[name]) for name in a)


def test_the_z_loss_is_logged_apart_and_does_not_depend_on_how_the_batch_is_cut(train, recipe):
    short = (quiet_config(recipe), "data.tokens=2048", "data.validation=[]", "training.save_strategy=no")
    strong = (*short, "run.z_loss=0.01")
    without = train(*short, name="without")
    one = train(*strong, "training.per_device_train_batch_size=16", name="one")
    four = train(*strong, "run.loss=whole", "training.per_device_train_batch_size=4", name="four")
    records = [[r for r in read_metrics(run) if "loss" in r] for run in (one, four)]
    for name in ("loss", "z_loss", "grad_norm"):
        assert [r[name] for r in records[0]] == pytest.approx([r[name] for r in records[1]], rel=1e-5), name
    assert losses(one)[1] == pytest.approx(losses(without)[1], rel=1e-6), "of the same weights, the cross entropy alone"
    assert losses(one)[4] != pytest.approx(losses(without)[4], rel=1e-6)
    # logits are near 0 at first, so that Z is about the number of tokens
    assert records[0][0]["z_loss"] == pytest.approx(0.01 * math.log(384) ** 2, rel=0.02)


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["run.z_loss=1e-4", "run.speed=stock"], "run.z_loss is 0.0001 but the model's own forward computes the loss"),
        (["training.optim=schedule_free_adamw"], "lr_scheduler_type is cosine_with_min_lr"),
        (["run.z_loss=0"], "run.z_loss is 0 but must be a number above 0"),
        (["run.muon.learning_rate=0.1"], "run.muon is set but run.optimizer is not muon"),
        ([*MUON, "training.optim=lion_32bit"], "training.optim is lion_32bit but run.optimizer is muon"),
        ([*MUON, "run.spikes.policy=skip"], "run.spikes.policy is skip but run.optimizer is muon"),
        ([*MUON, "run.muon.momentum=1.5"], "run.muon.momentum is 1.5 but must be below 1"),
        (["run.optimizer=moun"], "Did you mean muon"),
    ],
)
def test_what_cannot_work_is_refused(train, overrides, text):
    with pytest.raises(UserError, match=text):
        train(*overrides)


def test_muon_is_refused_where_matrices_are_not_whole(train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(UserError, match="is muon but DeepSpeed makes the update"):
            train(*MUON)
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(UserError, match="fsdp_offload_params keeps the weights on the CPU"):
        train(*MUON)


def test_the_card_and_the_record_name_muon(train):
    run = train(*MUON, "data.tokens=1024", "data.validation=[]")
    assert "Muon" in (run / "final" / "README.md").read_text()
    assert "optimizer: muon" in (run / "recipe.yaml").read_text()
    assert load_recipe(run / "recipe.yaml").problems.messages == [], "a run's record is a recipe"
    plain = train("data.tokens=1024", "data.validation=[]", name="plain")
    assert load_recipe(plain / "recipe.yaml").problems.messages == []
