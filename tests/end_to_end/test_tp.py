"""Tensor parallelism on CPU processes: the curve of one, and checkpoints that any layout goes on from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from .conftest import losses, quiet_config, read_metrics, recorded
from .test_fsdp import before_the_end
from .test_launch import BIN, ROOT, TORCHRUN, first_weights, launch

TP = ROOT / "accelerate_configs" / "tp.yaml"


def tp(recipe: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "accelerate"), "launch", "--quiet", "--config_file", str(TP), "--main_process_port", "0"]
    command += ["--num_processes", "2", "run_clm.py", str(recipe), f"training.run_name={name}"]
    done = launch(*command, *overrides)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


@pytest.mark.slow
def test_tensor_parallel_on_two_processes_is_one_process_and_any_layout_goes_on(train, recipe, run_cli):
    short = [quiet_config(recipe), "data.tokens=5120", "run.samples={prompts: [The], max_new_tokens: 4}"]
    short += ["data.document_mask=true", "run.record_blocks=true"]
    one = train(*short, name="one")
    done = tp(recipe, "two", *short)
    assert "x 1 group of 2 processes (tensor parallel) x 2 accumulation" in done.stdout
    assert done.stdout.count("saved checkpoint-10") == done.stdout.count("final model:") == 1
    two = one.with_name("two")
    assert first_weights(two) == first_weights(one)
    assert recorded(two) == recorded(one)
    assert np.allclose(list(losses(one).values()), list(losses(two).values()), rtol=1e-5)
    norms = [[r["grad_norm"] for r in read_metrics(run) if "grad_norm" in r] for run in (one, two)]
    assert np.allclose(*norms, rtol=1e-4)
    evaluations = [[r["eval_loss"] for r in read_metrics(run) if "eval_loss" in r] for run in (one, two)]
    assert len(evaluations[0]) == 2 and np.allclose(*evaluations, rtol=1e-5)
    assert (one / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text()

    weights = [load_file(run / "final" / "model.safetensors") for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])
    assert (one / "final" / "config.json").read_text() == (two / "final" / "config.json").read_text()
    reload = run_cli(["-m", "clm", "reload", "two"])
    assert reload.code == 0 and "reload: the same model" in reload.stdout, reload.stdout

    files = json.loads((two / "checkpoint-5" / "checkpoint.json").read_text())["files"]
    assert {"sharded/.metadata", "sharded/__0_0.distcp", "sharded/__1_0.distcp", "rng_state_1.pth"} <= set(files)
    again = before_the_end(two, "again")
    assert "continuing from" in tp(recipe, "again", *short).stdout
    assert losses(again) == losses(two), "bit for bit"
    assert (again / "final" / "model.safetensors").read_bytes() == (two / "final" / "model.safetensors").read_bytes()

    expected = list(losses(one).values())
    alone = before_the_end(two, "alone")
    train(*short, name="alone")
    assert np.allclose(list(losses(alone).values()), expected, rtol=1e-5)
    ddp = before_the_end(two, "ddp")
    done = launch(*TORCHRUN, "run_clm.py", str(recipe), *short, "training.run_name=ddp")
    assert done.returncode == 0, done.stderr
    assert np.allclose(list(losses(ddp).values()), expected, rtol=1e-5)
    back = before_the_end(one, "back")
    assert "continuing from" in tp(recipe, "back", *short).stdout, "and tensor parallelism from what one process wrote"
    assert np.allclose(list(losses(back).values()), expected, rtol=1e-5)
