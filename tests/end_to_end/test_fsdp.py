"""FSDP2 on CPU processes: the curve of one, shards that any layout resumes from, and a whole model at the end."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from clm.checkpoint import find_damage
from clm.run_folder import list_checkpoints, list_weights, model_folder
from data_prep.errors import UserError

from .conftest import losses, quiet_config, read_metrics, recorded
from .poison import BAD, excluded_blocks, on
from .test_launch import BIN, ROOT, TORCHRUN, first_weights, launch
from .test_speed import MIXTRAL

FSDP2 = ROOT / "accelerate_configs" / "fsdp2.yaml"
TP = ROOT / "accelerate_configs" / "tp.yaml"


def accelerate(
    config: Path, recipe: Path, name: str, *overrides: str, num_processes: int = 2, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "accelerate"), "launch", "--quiet", "--config_file", str(config), "--main_process_port", "0"]
    command += ["--num_processes", str(num_processes), "run_clm.py", str(recipe), f"training.run_name={name}"]
    done = launch(*command, *overrides, **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def fsdp(
    recipe: Path, name: str, *overrides: str, num_processes: int = 2, config: Path = FSDP2
) -> subprocess.CompletedProcess[str]:
    return accelerate(config, recipe, name, *overrides, num_processes=num_processes, CLM_FSDP_ON_CPU="1")


def test_context_and_sequence_parallel_launches_are_refused(train, monkeypatch):
    for name, expected in (("CP", "context parallelism"), ("SP", "sequence parallelism")):
        with monkeypatch.context() as patch:
            patch.setenv(f"PARALLELISM_CONFIG_{name}_SIZE", "2")
            with pytest.raises(UserError, match=f"{expected} .*_size 2.*docs/scale.md"):
                train("--dry-run")


def before_the_end(run: Path, name: str) -> Path:
    """A copy of a run as if it had been killed after its step 5."""
    copy = run.with_name(name)
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("final", "checkpoint-10"))
    return copy


def assert_is_one_process(other: Path, one: Path) -> None:
    """Curve, evaluations, samples and final model of a divided run are those of one process."""
    assert np.allclose(list(losses(one).values()), list(losses(other).values()), rtol=1e-5)
    norms = [[r["grad_norm"] for r in read_metrics(run) if "grad_norm" in r] for run in (one, other)]
    assert np.allclose(*norms, rtol=1e-4)
    evaluations = [[r["eval_loss"] for r in read_metrics(run) if "eval_loss" in r] for run in (one, other)]
    assert len(evaluations[0]) == 2 and np.allclose(*evaluations, rtol=1e-5)
    samples = [(run / "samples.jsonl").read_text() for run in (one, other) if (run / "samples.jsonl").exists()]
    assert len(samples) != 1 and len(set(samples)) <= 1
    weights = [load_file(run / "final" / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])
    assert (one / "final" / "config.json").read_text() == (other / "final" / "config.json").read_text()
    assert first_weights(other) == first_weights(one)


def assert_any_layout_goes_on(start: Callable[[str], Any], train: Callable[..., Path], two: Path, one: Path) -> None:
    """From step 5: the divided run bit for bit, one process from its shards, and it from what one process wrote.

    Args:
        start: starts or continues the divided run of a name.
        train: the same on one process, `train(name=...)`.
    """
    again = before_the_end(two, "again")
    assert "continuing from" in start("again").stdout
    assert losses(again) == losses(two), "bit for bit"
    assert (again / "final" / "model.safetensors").read_bytes() == (two / "final" / "model.safetensors").read_bytes()
    expected = list(losses(one).values())
    alone = before_the_end(two, "alone")
    train(name="alone")
    assert np.allclose(list(losses(alone).values()), expected, rtol=1e-5)
    back = before_the_end(one, "back")
    assert "continuing from" in start("back").stdout, "what one process wrote"
    assert np.allclose(list(losses(back).values()), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "version, num_processes, overrides, expected",
    [
        (2, 2, [], "CLM_FSDP_ON_CPU=1 accelerate launch"),
        (1, 2, [], "Write fsdp_version: 2"),
        (2, 1, [], "FSDP divides the model among processes but there is one"),
        (2, 2, ["training.optim=adafactor"], "whose state under FSDP2 is not that of the whole parameter"),
        (2, 2, ["run.spikes.policy=skip"], "under FSDP2 and tensor parallelism the update has no gate"),
        (2, 2, ["training.torch_compile=true"], "which is not tested with FSDP2"),
        (2, 2, ["run.optimizer=muon", "run.spikes.policy=skip"], "run.optimizer is muon, which has no gate"),
    ],
)
def test_what_fsdp_cannot_do_is_refused_with_the_remedy(
    train, monkeypatch, version, num_processes, overrides, expected
):
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", version), ("WORLD_SIZE", num_processes)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=expected):
        train(*overrides)


@pytest.mark.slow
def test_fsdp_on_two_processes_is_one_process_and_any_layout_goes_on_from_its_shards(train, recipe, run_cli):
    short = [quiet_config(recipe), "data.tokens=5120", "run.samples={prompts: [The], max_new_tokens: 4}"]
    short += ["data.document_mask=true"]
    one = train(*short, name="one")
    done = fsdp(recipe, "two", *short)
    assert done.stdout.count("saved checkpoint-10") == done.stdout.count("final model:") == 1
    two = one.with_name("two")
    assert_is_one_process(two, one)
    assert (two / "samples.jsonl").exists()
    reload = run_cli(["-m", "clm", "reload", "two"])
    assert reload.code == 0 and "reload: the same model" in reload.stdout, reload.stdout

    checkpoint = two / "checkpoint-5"
    files = json.loads((checkpoint / "checkpoint.json").read_text())["files"]
    assert {"sharded/.metadata", "sharded/__0_0.distcp", "sharded/__1_0.distcp", "rng_state_1.pth"} <= set(files)
    assert not any(name.startswith(("model", "optimizer")) for name in files)
    assert_any_layout_goes_on(lambda name: fsdp(recipe, name, *short), partial(train, *short), two, one)
    ddp = before_the_end(two, "ddp")
    done = launch(*TORCHRUN, "run_clm.py", str(recipe), *short, "training.run_name=ddp")
    assert done.returncode == 0, done.stderr
    assert np.allclose(list(losses(ddp).values()), list(losses(one).values()), rtol=1e-5)

    damaged = before_the_end(two, "damaged")
    shards = damaged / "checkpoint-5" / "sharded" / "__1_0.distcp"
    content = bytearray(shards.read_bytes())
    content[len(content) // 2] ^= 1
    shards.write_bytes(content)
    assert "__1_0.distcp has changed" in find_damage(damaged / "checkpoint-5")


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [True, False])
def test_weights_of_sharded_checkpoints_are_kept_alone_and_read_by_commands(recipe, run_cli, is_tied):
    from transformers import AutoModelForCausalLM

    config = recipe.with_name("tiny_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": is_tied}))
    short = ["data.tokens=5120", "run.retention={last: 1, weights: all}", "training.save_steps=4"]
    fsdp(recipe, "two", *short)
    run = recipe.parent / "runs" / "two"
    assert [step for step, _ in list_checkpoints(run)] == [10]
    assert [step for step, _ in list_weights(run)] == [4, 8]
    final = AutoModelForCausalLM.from_pretrained(run / "final").state_dict()
    folder = model_folder(run, 10)
    whole = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(whole[name], final[name]) for name in final) and whole.keys() == final.keys()
    earlier = AutoModelForCausalLM.from_pretrained(model_folder(run, 8)).state_dict()
    assert earlier.keys() == final.keys() and not torch.equal(earlier["model.norm.weight"], final["model.norm.weight"])
    done = run_cli(["-m", "clm", "export", "two", "--checkpoint", "10"])
    assert done.code == 0 and "same numbers" in done.stdout, done.stderr


@pytest.mark.slow
def test_hsdp_on_four_processes_is_one_process_and_writes_each_shard_once(train, recipe, tmp_path):
    short = [quiet_config(recipe), "data.tokens=5120"]
    one = train(*short, name="one")
    settings = yaml.safe_load((ROOT / "accelerate_configs" / "hsdp.yaml").read_text())
    settings["parallelism_config"]["parallelism_config_dp_shard_size"] = 2
    config = tmp_path / "hsdp.yaml"
    config.write_text(yaml.safe_dump(settings))
    small = "training.per_device_train_batch_size=4"
    fsdp(recipe, "four", *short, small, num_processes=4, config=config)
    four = one.with_name("four")
    assert np.allclose(list(losses(one).values()), list(losses(four).values()), rtol=1e-5)
    sizes = [path.stat().st_size for path in sorted((four / "checkpoint-5" / "sharded").glob("*.distcp"))]
    assert sizes[2:] == [0, 0] and min(sizes[:2]) > 100_000
    assert first_weights(four) == first_weights(one)
    again = before_the_end(four, "again")
    fsdp(recipe, "again", *short)
    assert np.allclose(list(losses(one).values()), list(losses(again).values()), rtol=1e-5)


@pytest.mark.slow
def test_muon_under_fsdp_is_that_of_one_process_and_goes_on_in_other_layouts(train, recipe):
    short = [quiet_config(recipe), "data.tokens=5120", "data.validation=[]", "run.optimizer=muon"]
    short += ["run.muon.learning_rate=0.01", "training.learning_rate=3e-3"]
    one = train(*short, name="one")
    fsdp(recipe, "two", *short)
    two = one.with_name("two")
    expected = list(losses(one).values())
    # the first updates are the same to 1e-6; after that a sum in another order may round to another bf16
    assert np.allclose(list(losses(two).values())[:3], expected[:3], rtol=1e-5)
    assert np.allclose(list(losses(two).values()), expected, rtol=1e-3)
    again = before_the_end(two, "again")
    fsdp(recipe, "again", *short)
    assert losses(again) == losses(two), "bit for bit"
    alone = before_the_end(two, "alone")
    train(*short, name="alone")
    assert np.allclose(list(losses(alone).values()), expected, rtol=1e-3)
    back = before_the_end(one, "back")
    assert "continuing from" in fsdp(recipe, "back", *short).stdout, "and FSDP2 from what one process wrote"
    assert np.allclose(list(losses(back).values()), expected, rtol=1e-3)


@pytest.mark.slow
def test_muon_with_experts_under_fsdp_is_that_of_one_process(train, recipe, tmp_path):
    config = tmp_path / "mixtral.json"  # no router loss: it depends on how the batch is cut
    config.write_text(json.dumps({**MIXTRAL, "router_aux_loss_coef": 0.0}))
    short = [f"model.config={config}", "data.tokens=2560", "data.validation=[]", "run.optimizer=muon"]
    short += ["run.muon.learning_rate=0.01", "training.learning_rate=3e-3"]
    one = train(*short, name="one")
    fsdp(recipe, "two", *short)
    assert np.allclose(list(losses(one.with_name("two")).values()), list(losses(one).values()), rtol=1e-3)


@pytest.mark.slow
def test_stages_under_fsdp_are_those_of_one_process(train, staged, recipe):
    quiet = quiet_config(recipe)
    one = train(*staged, quiet, name="one")
    fsdp(recipe, "two", *staged, quiet, "training.per_device_train_batch_size=2")
    two = one.with_name("two")
    assert recorded(two, 2) == recorded(one)
    assert losses(two) == pytest.approx(losses(one), abs=2e-5)
    assert json.loads((two / "final" / "config.json").read_text())["rope_parameters"]["rope_theta"] == 50000


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["fsdp2", "tp"])
def test_a_rollback_of_a_divided_model_takes_out_the_same_blocks(train, recipe, poisoned, samples_of_step, launcher):
    poison = (quiet_config(recipe), *on(poisoned, "rollback"))
    one = train(*poison, name="one")
    if launcher == "tp":
        accelerate(TP, recipe, "two", *poison)
    else:
        fsdp(recipe, "two", *poison, "training.per_device_train_batch_size=8")
    two = one.with_name("two")
    assert excluded_blocks(two) == {b for step in BAD for b in samples_of_step[step].tolist()}
    assert [r["step"] for r in read_metrics(two) if "loss" in r] == list(range(1, 61))
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
