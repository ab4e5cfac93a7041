"""One small run through the front door: what it writes, what it refuses, and that the model is the trained one."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

import run_clm
from data_prep.errors import UserError

from .conftest import losses, quiet_config, read_metrics


def test_a_run_writes_everything_the_contract_names(train):
    run = train("run.samples={prompts: [The river], max_new_tokens: 5}")
    assert {"recipe.yaml", "metrics.jsonl", "train.log", "samples.jsonl", "curve.svg", "final"} <= set(os.listdir(run))
    records = read_metrics(run)
    points = [r for r in records if "loss" in r]
    assert [r["step"] for r in points] == list(range(1, 21))
    for r in points:
        assert {"step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_s", "time_s"} <= set(r)
        assert r["tokens"] == r["step"] * 512
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 10, 20]
    assert records[-1]["finished"] is True
    evaluation = next(r for r in reversed(records) if "eval_loss" in r)
    assert evaluation["eval_num_tokens"] in (2048, 2047)
    assert evaluation["eval_perplexity"] == pytest.approx(math.exp(evaluation["eval_loss"]))
    assert points[-1]["loss"] < points[0]["loss"] - 1.0
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())["resolved"]
    assert (resolved["num_processes"], resolved["num_steps"], resolved["num_tokens"]) == (1, 20, 10_240)
    assert resolved["stages"][0]["gradient_accumulation_steps"] == 2
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-20"]
    assert len((run / "samples.jsonl").read_text().splitlines()) == 3
    assert not (run / ".saving").exists()


def test_the_final_model_is_the_trained_one_and_loads_without_this_repository(train, run_cli, prepared, tmp_path):
    run = train()
    expected = next(r for r in reversed(read_metrics(run)) if "eval_loss" in r)
    config = json.loads((run / "final" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, 2)
    assert "attn_implementation" not in json.dumps(config)
    assert not (run / "final" / "training_args.bin").exists()
    assert (run / "final" / "model.safetensors").stat().st_mode & 0o044, "others can read it, as the umask says"
    script = tmp_path / "elsewhere.py"
    script.write_text(
        "import sys, torch, numpy as np\n"
        "from datasets import load_from_disk\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "stream = np.array(load_from_disk(sys.argv[2])['input_ids']).reshape(-1)[:2049]\n"
        "nll = n = 0\n"
        "for i in range(0, 2048, 32):\n"
        "    x, y = (torch.tensor(stream[i + k : i + k + 32].astype(int))[None] for k in (0, 1))\n"
        "    logp = model(x).logits.double().log_softmax(-1)[0, : y.shape[1]]\n"
        "    nll -= logp.gather(1, y.T).sum().item(); n += y.shape[1]\n"
        "print(nll / n, AutoTokenizer.from_pretrained(sys.argv[1]).eos_token)\n"
        "print(pipeline('text-generation', model=sys.argv[1])('The river', max_new_tokens=3)[0]['generated_text'])\n"
    )
    result = run_cli([script, run / "final", prepared.folder / "validation"], cwd=tmp_path, env={"PYTHONPATH": ""})
    assert result.code == 0, result.stderr
    loss, eos = result.stdout.splitlines()[0].split()
    assert float(loss) == pytest.approx(expected["eval_loss"], abs=2e-6)
    assert eos == "[EOT]"
    assert "The river" in result.stdout


def test_a_finished_run_says_so_and_changes_nothing(train, capsys):
    run = train()
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    capsys.readouterr()
    train()
    assert "is finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_a_run_folder_of_another_recipe_is_refused(train):
    run = train()
    (run / "final").rename(run / "gone")
    with pytest.raises(
        UserError, match=r"(?s)belongs to another recipe.*training.learning_rate: 0.01 in the run, 0.02"
    ):
        train("training.learning_rate=2e-2")
    with pytest.raises(UserError, match="training.run_name=tiny-2"):
        train("data.tokens=20480")
    with pytest.raises(UserError, match=r"training.learning_rat is not .* Did you mean learning_rate"):
        train("training.learning_rat=2e-2")


def test_what_changes_nothing_may_change_between_two_starts(train):
    run = train()
    (run / "final").rename(run / "gone")
    train("training.logging_steps=3", "training.save_steps=7", "training.per_device_train_batch_size=4")
    assert (run / "final").is_dir()


def test_data_that_was_prepared_anew_is_refused(train, recipe, prepared, tmp_path):
    import shutil

    data = Path(shutil.copytree(prepared.folder, tmp_path / "data" / "copy"))
    recipe.write_text(recipe.read_text().replace(str(prepared.folder), str(data)))
    run = train()
    (run / "final").rename(run / "gone")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["fingerprint"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="the data has changed"):
        train()


def test_a_dry_run_prints_everything_and_writes_nothing(recipe, tmp_path, capsys):
    run_clm.main([str(recipe), "--dry-run"])
    text = capsys.readouterr().out
    for part in (
        "8 rows x 32 tokens x 1 processes x 2 accumulation = 512",
        "= 20 steps",
        "step 0: 0",
        "passes",
        "disk",
        "x 10^6",
        "x 2^20",
    ):
        assert part in text
    assert not (tmp_path / "runs").exists()


def test_the_same_recipe_gives_the_same_losses_bit_for_bit(train):
    assert losses(train(name="a")) == losses(train(name="b"))


def test_the_global_batch_does_not_depend_on_the_micro_batch(train, recipe):
    # without dropout the same 16 rows give the same mean, in another order of additions
    quiet = quiet_config(recipe)
    one = losses(train(quiet, "training.per_device_train_batch_size=16", name="16x1"))
    many = losses(train(quiet, "training.per_device_train_batch_size=2", name="2x8"))
    assert np.allclose(list(one.values()), list(many.values()), rtol=1e-5)


def test_continuing_a_base_model_starts_at_its_loss_with_fp32_masters(train, recipe, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = train(name="base")
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base / "final").to(torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(base / "final").save_pretrained(half)
    text = recipe.read_text()
    recipe.write_text(text.replace(next(line for line in text.splitlines() if "config:" in line), f"  init: {half}"))
    run = train("data.tokens=1024", name="continued")
    last = next(r for r in reversed(read_metrics(base)) if "eval_loss" in r)
    first = next(r for r in read_metrics(run) if "eval_loss" in r)
    assert first["step"] == 0
    assert first["eval_loss"] == pytest.approx(last["eval_loss"], abs=0.02)  # bf16 rounding of the weights
    saved = AutoModelForCausalLM.from_pretrained(run / "final", dtype="auto")
    assert {p.dtype for p in saved.parameters()} == {torch.float32}


@pytest.mark.slow
def test_the_control_with_permuted_labels_learns_nothing_but_frequencies(train, prepared):
    from data_prep.tally import tally_dataset

    normal = train("data.tokens=61440", name="normal")
    control = train("data.tokens=61440", "data.permute_labels=true", name="control")
    frequencies = tally_dataset(prepared.folder).validation_cross_entropy
    final = [next(r for r in reversed(read_metrics(run)) if "eval_loss" in r)["eval_loss"] for run in (normal, control)]
    assert final[0] < frequencies - 0.5
    assert frequencies - 0.02 < final[1] < frequencies + 0.35  # 60 k tokens: it is still on its way, but not below


def test_two_validation_sets_are_named_and_summed(train, prepared, tmp_path):
    import shutil

    other = shutil.copytree(prepared.folder, tmp_path / "other")
    run = train(
        f"data.validation=[{{dataset: {prepared.folder}, tokens: 1024}}, {{dataset: {other}, tokens: 512}}]",
        "data.tokens=512",
    )
    record = next(r for r in read_metrics(run) if "eval_loss" in r)
    assert record["eval_tiny_num_tokens"] + record["eval_other_num_tokens"] == record["eval_num_tokens"] == 1536
    total = record["eval_tiny_loss"] * 1024 + record["eval_other_loss"] * 512
    assert record["eval_loss"] == pytest.approx(total / 1536)


def test_a_loss_that_is_no_number_ends_the_run_with_a_sentence(train):
    with pytest.raises(UserError, match="the loss is nan at step"):
        train("training.learning_rate=1e38", "training.max_grad_norm=0", "training.warmup_steps=0")


@pytest.mark.slow
def test_tensorboard_and_wandb_offline_keep_one_run_over_a_resume(train):
    run = train("training.report_to=[tensorboard, wandb]", "data.tokens=5120")
    name = (run / "wandb_run_id").read_text()
    (run / "final").rename(run / "gone")
    (run / "checkpoint-10").rename(run / "gone-10")
    train("training.report_to=[tensorboard, wandb]", "data.tokens=5120")
    assert (run / "wandb_run_id").read_text() == name
    assert len(list((run / "wandb").glob(f"offline-run-*-{name}"))) >= 1
    assert {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")} == {name}
    assert len(list((run / "tensorboard").glob("events*"))) == 2, "both parts lie in one folder: one curve"


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_damaged_shard_is_named_before_the_training(train, recipe, prepared, tmp_path, damage):
    import shutil

    data = Path(shutil.copytree(prepared.folder, tmp_path / "copy"))
    shard = data / "train" / "data-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-64]) if damage == "truncate" else shard.unlink()
    with pytest.raises(UserError, match="data-00000.arrow .*make check"):
        train(f"data.mixture=[{{dataset: {data}}}]")
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_names_another_tokenizer_than_its_data_has_is_refused(train, prepared):
    with pytest.raises(UserError, match="data.tokenizer is train:500 but .* was prepared with"):
        train("data.tokenizer={train: 500}")
    with pytest.raises(UserError, match="data.tokenizer is gpt2 but"):
        train("data.tokenizer=gpt2")
    train(f"data.tokenizer={prepared.tokenizer}", "data.tokens=512", name="a")
    train("data.tokenizer={train: 384}", "data.tokens=512", name="b")
