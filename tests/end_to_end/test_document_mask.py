"""data.document_mask through the front door: layouts agree, the final model gives the written loss, a leak stops."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from transformers import masking_utils

from clm.reload import reload_run
from data_prep.blocks import Blocks
from data_prep.errors import UserError

from .conftest import losses, quiet_config, read_metrics

ROOT = Path(__file__).parents[2]
MASK = "data.document_mask=true"


def test_a_masked_run_evaluates_on_its_targets_and_reload_computes_the_same_loss(train, prepared, capsys):
    blocks = Blocks(prepared.folder, "validation")
    all_of_it = f"data.validation=[{{dataset: {prepared.folder}, tokens: {blocks.num_tokens}}}]"
    plain, run = (
        train(all_of_it, name="plain"),
        train(all_of_it, MASK, "run.samples={prompts: [The river], max_new_tokens: 4}", name="masked"),
    )
    eos = blocks.manifest.tokenizer.eos_token_id
    tokens = blocks.read(np.arange(blocks.num_blocks))
    num_targets = int(((tokens[:, :-1] != eos) & (tokens[:, 1:] != -100)).sum())
    evaluations = [[r for r in read_metrics(r) if "eval_loss" in r] for r in (plain, run)]
    assert {r["eval_num_tokens"] for r in evaluations[1]} == {num_targets}
    assert num_targets < evaluations[0][0]["eval_num_tokens"]
    assert evaluations[1][0]["eval_loss"] != evaluations[0][0]["eval_loss"]
    assert capsys.readouterr().out.count("documents    masked: no attention across them") == 1
    assert reload_run(str(run)) == 0
    assert f"({num_targets:,} tokens, fp32)" in capsys.readouterr().out
    assert yaml.safe_load((run / "recipe.yaml").read_text())["data"]["document_mask"] is True
    configs = [json.loads((r / "final" / "config.json").read_text()) for r in (plain, run)]
    assert configs[0] == configs[1]
    assert [json.loads(line)["step"] for line in (run / "samples.jsonl").read_text().splitlines()] == [0, 10, 20]


@pytest.mark.slow
def test_the_mask_changes_the_training_and_the_test_of_the_back_end_does_not(train, monkeypatch):
    masked = train(MASK, "data.tokens=2560", name="masked")
    monkeypatch.setattr("clm.run_flow.check_run", lambda trainer: None)
    untested = train(MASK, "data.tokens=2560", name="untested")
    assert losses(masked) == losses(untested), "not a bit, with dropout on"
    plain = train("data.tokens=2560", name="plain")
    assert all(losses(plain)[step] != loss for step, loss in losses(masked).items())


def test_micro_batch_and_accumulation_do_not_matter_though_their_targets_differ_in_number(train, recipe):
    quiet = quiet_config(recipe)
    runs = [
        train(MASK, quiet, "data.tokens=2560", f"training.per_device_train_batch_size={rows}", name=f"of-{rows}")
        for rows in (16, 2)
    ]
    assert np.allclose(*(list(losses(run).values()) for run in runs), rtol=1e-5)
    weights = [load_file(run / "final" / "model.safetensors") for run in runs]
    assert all(np.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])


@pytest.mark.slow
def test_a_masked_run_resumes_bit_for_bit_and_not_without_the_mask(train):
    whole = train(MASK, "data.tokens=5120", name="whole")
    again = train(MASK, "data.tokens=5120", name="again")
    (again / "final").rename(again / "gone")
    (again / "checkpoint-10").rename(again / "gone-10")
    with pytest.raises(UserError, match="data.document_mask: True in the run, False in"):
        train("data.tokens=5120", name="again")
    train(MASK, "data.tokens=5120", name="again")
    assert losses(whole) == losses(again)
    assert (whole / "final" / "model.safetensors").read_bytes() == (again / "final" / "model.safetensors").read_bytes()


def test_a_back_end_that_mixes_documents_ends_the_run_before_its_first_step(train, monkeypatch):
    # a transformers that makes no mask any more for this attention
    monkeypatch.delitem(masking_utils.AttentionMaskInterface._global_mapping, "sdpa")
    with pytest.raises(UserError) as error:
        train(MASK, name="leaking")
    assert "tiny.yaml: model.attention is sdpa but data.document_mask is true" in str(error.value)
    assert "Set model.attention: eager (tested just now)" in str(error.value)
    assert not (Path(os.environ["RUNS_DIR"]) / "leaking" / "metrics.jsonl").exists()
    train("data.tokens=512", name="unmasked")  # where nothing needs a mask, nothing is tested


def launch(*command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_two_processes_with_other_numbers_of_targets_give_the_losses_of_one(train, recipe):
    quiet = quiet_config(recipe)
    one = train(MASK, quiet, "data.tokens=5120", name="one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run_clm.py"]
    overrides = [MASK, quiet, "data.tokens=5120", "training.run_name=two", "training.dataloader_num_workers=1"]
    launch(*command, str(recipe), *overrides)
    two = one.with_name("two")
    assert np.allclose(list(losses(one).values()), list(losses(two).values()), rtol=1e-5)
    counts = [[r["eval_num_tokens"] for r in read_metrics(run) if "eval_loss" in r] for run in (one, two)]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_a_compiled_run_gives_the_losses_of_one_that_is_not(train, recipe):
    quiet = quiet_config(recipe)
    runs = [
        train(MASK, quiet, "data.tokens=2560", f"training.torch_compile={word}", name=f"compile-{word}")
        for word in ("false", "true")
    ]
    assert np.allclose(*(list(losses(run).values()) for run in runs), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its CPU communication with c++")
def test_zero_stage_3_tests_its_back_end_on_all_ranks_and_gives_the_losses_of_one_process(train, recipe):
    pytest.importorskip("deepspeed", exc_type=ImportError)
    quiet = quiet_config(recipe)
    one = train(MASK, quiet, "data.tokens=2560", name="one")
    accelerate = [str(Path(sys.executable).parent / "accelerate"), "launch", "--quiet", "--num_processes", "2"]
    config = ["--config_file", "accelerate_configs/zero3.yaml", "--main_process_port", "0"]
    launch(*accelerate, *config, "run_clm.py", str(recipe), MASK, quiet, "data.tokens=2560", "training.run_name=two")
    assert np.allclose(list(losses(one).values()), list(losses(one.with_name("two")).values()), rtol=1e-5)
