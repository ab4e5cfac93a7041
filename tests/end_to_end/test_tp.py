"""Tensor parallelism on CPU processes: the curve of one, and checkpoints that any layout goes on from."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.errors import UserError

from .conftest import losses, quiet_config, recorded
from .test_fsdp import TP, accelerate, assert_any_layout_goes_on, assert_is_one_process, before_the_end, fsdp
from .test_launch import ROOT, TORCHRUN, launch

tp = partial(accelerate, TP)


@pytest.mark.slow
def test_tensor_parallel_on_two_processes_is_one_process_and_any_layout_goes_on(train, recipe, run_cli):
    short = [quiet_config(recipe), "data.tokens=5120", "run.samples={prompts: [The], max_new_tokens: 4}"]
    short += ["data.document_mask=true", "run.record_blocks=true"]
    one = train(*short, name="one")
    done = tp(recipe, "two", *short)
    assert "x 1 group of 2 processes (tensor parallel) x 2 accumulation" in done.stdout
    assert done.stdout.count("saved checkpoint-10") == done.stdout.count("final model:") == 1
    two = one.with_name("two")
    assert recorded(two) == recorded(one)
    assert_is_one_process(two, one)
    assert (two / "samples.jsonl").exists()
    reload = run_cli(["-m", "clm", "reload", "two"])
    assert reload.code == 0 and "reload: the same model" in reload.stdout, reload.stdout

    files = json.loads((two / "checkpoint-5" / "checkpoint.json").read_text())["files"]
    assert {"sharded/.metadata", "sharded/__0_0.distcp", "sharded/__1_0.distcp", "rng_state_1.pth"} <= set(files)
    assert_any_layout_goes_on(lambda name: tp(recipe, name, *short), partial(train, *short), two, one)


REFUSALS = [
    ({}, 4, [], "there are 4 processes. Start 2, or say --parallelism_config_tp_size 4"),
    ({"PARALLELISM_CONFIG_TP_SIZE": 4}, 4, [], "num_key_value_heads 2, which tp_size 4 does not divide"),
    ({"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": 2}, 4, [], "use dp_shard_size, as in accelerate_configs/tp_fsdp2.yaml"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": 2}, 2, [], "Their product must be the number of processes"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, 2, [], "beside DeepSpeed, which divides the model itself"),
    ({}, 2, ["training.optim=adafactor"], "whose state under tensor parallelism is not that of the whole parameter"),
    ({}, 2, ["training.torch_compile=true"], "which is not tested with tensor parallelism"),
    ({}, 2, ["run.optimizer=muon"], "run.optimizer is muon, which is not tested with tensor parallelism"),
    ({}, 2, ["run.ema.decay=0.9"], "FSDP or tensor parallelism"),
    ({}, 2, ["run.spikes.policy=skip"], "under FSDP2 and tensor parallelism the update has no gate"),
]


@pytest.mark.parametrize("environment, num_processes, overrides, expected", REFUSALS)
def test_what_tensor_parallelism_cannot_do_is_refused_with_the_remedy(
    train, monkeypatch, environment, num_processes, overrides, expected
):
    for name, value in {"PARALLELISM_CONFIG_TP_SIZE": 2, "WORLD_SIZE": num_processes, **environment}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=expected):
        train(*overrides)


@pytest.mark.slow
def test_tensor_parallel_within_fsdp_is_one_process_and_any_layout_goes_on(train, recipe, tmp_path):
    settings = yaml.safe_load((ROOT / "accelerate_configs" / "tp_fsdp2.yaml").read_text())
    settings["parallelism_config"]["parallelism_config_dp_shard_size"] = 2
    config = tmp_path / "tp_fsdp2.yaml"
    config.write_text(yaml.safe_dump(settings))
    short = [quiet_config(recipe), "data.tokens=5120", "run.record_blocks=true"]
    short += ["training.per_device_train_batch_size=4"]
    one = train(*short, name="one")
    done = fsdp(recipe, "four", *short, num_processes=4, config=config)
    assert "x 2 groups of 2 processes (tensor parallel) x 2 accumulation" in done.stdout
    four = one.with_name("four")
    assert recorded(four, 2) == recorded(one)
    assert_is_one_process(four, one)
    again = before_the_end(four, "again")
    fsdp(recipe, "again", *short, num_processes=4, config=config)
    assert losses(again) == losses(four), "bit for bit"
    alone = before_the_end(four, "alone")
    train(*short, name="alone")
    assert np.allclose(list(losses(alone).values()), list(losses(one).values()), rtol=1e-5)


@pytest.mark.slow
def test_stages_under_tensor_parallelism_are_those_of_one_process(train, staged, recipe):
    quiet = quiet_config(recipe)
    one = train(*staged, quiet, name="one")
    tp(recipe, "two", *staged, quiet)
    two = one.with_name("two")
    assert recorded(two) == recorded(one)
    assert losses(two) == pytest.approx(losses(one), abs=2e-5)
    assert json.loads((two / "final" / "config.json").read_text())["rope_parameters"]["rope_theta"] == 50000


# A device that computes wrongly: after each update the norms of process 1 are moved a little.
WRONG = """
import os, torch, run_clm
if os.environ["RANK"] == "1":
    step = torch.optim.AdamW.step
    def wrong(self, *args, **kwargs):
        step(self, *args, **kwargs)
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.dim() == 1):
                parameter.detach().to_local().add_(1e-3)
    torch.optim.AdamW.step = wrong
run_clm.cli()
"""


@pytest.mark.slow
def test_a_process_whose_copies_drift_apart_ends_the_run_before_it_saves(recipe, tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    environment = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}
    done = launch(*TORCHRUN, str(script), str(recipe), "training.run_name=wrong", **environment)
    assert done.returncode != 0
    assert "error: Weights that processes 0, 1 hold alike are not the same any more: model." in done.stderr
    assert "layers.0.input_layernorm.weight" in done.stderr
    assert not list((Path(os.environ["RUNS_DIR"]) / "wrong").glob("checkpoint-*"))


# Loss and gradients of a divided model beside those of the whole one.
COMPARE = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM
from clm.fsdp import fill
from clm.loss_only import install
from clm.tensor_parallel import MODEL_TYPES, divide
from tests.tiny import SHAPE

mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
for kind in MODEL_TYPES:
    for is_tied in (True, False):
        more = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {"head_dim": 8, "pad_token_id": 0}
        config = AutoConfig.for_model(kind, **SHAPE, **more, tie_word_embeddings=is_tied, initializer_range=0.2)
        whole = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        for number, parameter in enumerate(whole.parameters()):
            torch.nn.init.normal_(parameter, 0.1, 0.2, torch.Generator().manual_seed(number))
        with torch.device("meta"):
            divided = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        divide(divided, mesh)
        divided.to_empty(device="cpu")
        parts = dict(divided.named_parameters())
        assert [n for n, _ in whole.named_parameters()] == list(parts)
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                fill(parts[name], parameter)
            for name, buffer in whole.named_buffers():
                divided.get_buffer(name).copy_(buffer)
        rows = torch.randint(2, 384, (2, 16), generator=torch.Generator().manual_seed(0))
        losses = []
        for model in (whole, divided):
            install(model, "chunked")
            losses.append(model(rows, shift_labels=rows.roll(-1, 1)).loss)
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(parts[name].grad.full_tensor(), parameter.grad, rtol=1e-4, atol=1e-6)
        is_less = sum(p.to_local().numel() for p in parts.values()) < sum(p.numel() for p in whole.parameters())
        assert is_less
        if dist.get_rank() == 0:
            print("same", kind, flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_every_type_has_the_loss_and_the_gradients_of_the_whole_model(tmp_path):
    script = tmp_path / "compare.py"
    script.write_text(COMPARE)
    done = launch(*TORCHRUN, str(script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == 12
