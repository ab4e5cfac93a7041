"""A finished run small enough for every test: on the prepared tiny corpus, with a real (untrained) model in final/.

Tests that write use `run_copy`; the others share one run per session.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from tiny import SHAPE

BLOCK_SIZE = 32  # a prepared block, of 64, is two rows

RECIPE = """\
model:
  config: {config}
data:
  mixture: [{{dataset: {dataset}}}]
  block_size: 32
  tokens: 10_000
  tokens_per_step: 512
training:
  per_device_train_batch_size: 8
  learning_rate: 1e-3
"""


@pytest.fixture(scope="session")
def small_run(prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/small as training leaves it; its evaluation was computed one row at a time, from float64 logits."""
    run = tmp_path_factory.mktemp("root") / "runs" / "small"
    run.mkdir(parents=True)
    model, tokenizer = _make_model(prepared.folder)
    for folder in (run / "final", run / "checkpoint-10"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (run / "checkpoint-10" / "checkpoint.json").write_text("{}")
    evaluation = _evaluate(model, tokenizer, prepared.folder)
    metrics = [{"step": 0, "tokens": 0, **evaluation, "eval_loss": 5.9, "eval_bits_per_byte": 4.1, "time_s": 0.1}]
    for step in range(1, 11):
        metrics.append(
            {"step": step, "tokens": 640 * step, "loss": 6 - step / 10, "learning_rate": 1e-3, "time_s": 0.5 * step}
        )
    metrics.append({"step": 10, "tokens": 6400, **evaluation, "time_s": 5.2})
    metrics.append({"step": 10, "tokens": 6400, "finished": True, "time_s": 5.25})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    recipe = _make_recipe(prepared.folder, model.num_parameters(), evaluation)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return run


@pytest.fixture
def run_copy(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(small_run, tmp_path / "runs" / "small"))


@pytest.fixture
def plan_of(tmp_path: Path, prepared, monkeypatch: pytest.MonkeyPatch):
    """`plan_of("data.tokens=1K", num_processes=2) -> Plan` of a recipe of 20 steps of 512 tokens."""
    from clm.plan import make_plan
    from clm.recipe import load_recipe

    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "vocab_size": 384,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": 64,
            }
        )
    )
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(config=config, dataset=prepared.folder))

    def plan(*overrides, num_processes=1):
        return make_plan(load_recipe(path, overrides), num_processes)

    return plan


@pytest.fixture
def started(plan_of):
    """`started("data.tokens=1K", newest=5) -> the folder of a run that was started and has trained 5 of its steps`."""
    from clm.run_record import write_record

    def make(*overrides, num_processes=1, newest=0):
        plan = plan_of(*overrides, num_processes=num_processes)
        plan.run_folder.mkdir(parents=True, exist_ok=True)
        write_record(plan)
        lines = [json.dumps({"step": step, "loss": 5.0}) + "\n" for step in range(1, newest + 1)]
        (plan.run_folder / "metrics.jsonl").write_text("".join(lines))
        make.plan = plan
        return plan.run_folder

    return make


@pytest.fixture
def two_documents(tmp_path, prepared):
    """(folder, overrides): two documents, of which the first holds markup and an escape sequence, in blocks of 32; and
    what makes `started` a run of two steps on them, each of two rows of 16 tokens, in written order."""
    from data_prep.__main__ import main as prep

    texts = ["<script>alert('x')</script>\x1b[31m & naïve\n", "The river carries seven stones 🙂.\n" * 4]
    rows = [json.dumps({"text": text, "url": f"https://example.org/{i}?a=1&b=<i>"}) for i, text in enumerate(texts)]
    folder = tmp_path / "two"
    (tmp_path / "two.jsonl").write_text("\n".join(rows))
    options = ["--tokenizer", prepared.tokenizer, "--block-size", 32, "--val-fraction", 0, "--num-proc", 1]
    assert prep(list(map(str, ["prep", tmp_path / "two.jsonl", *options, "--out", folder]))) == 0
    data = [f"data.mixture=[{{dataset: {folder}}}]", "data.validation=[]", "data.shuffle=false", "data.tokens=64"]
    return folder, [*data, "data.block_size=16", "data.tokens_per_step=32", "training.per_device_train_batch_size=2"]


def _make_model(dataset: Path):
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(dataset / "tokenizer")
    config = LlamaConfig(
        **{**SHAPE, "vocab_size": len(tokenizer)},
        initializer_range=0.3,  # far from uniform, so that a wrong position or label shows
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval(), tokenizer


def _evaluate(model, tokenizer, dataset: Path) -> dict[str, float]:
    """The evaluation by the book: the stream of validation tokens, row by row, each token predicted from its row."""
    import torch
    from datasets import load_from_disk

    stream = [token for row in load_from_disk(str(dataset / "validation"))["input_ids"] for token in row]
    nll, count, num_bytes = 0.0, 0, 0
    for first in range(0, len(stream), BLOCK_SIZE):
        following = stream[first + 1 : first + BLOCK_SIZE + 1]
        with torch.no_grad():
            logits = model(torch.tensor([stream[first : first + BLOCK_SIZE]])).logits[0].double()
        logp = logits.log_softmax(-1)
        nll -= sum(logp[i, token].item() for i, token in enumerate(following))
        count += len(following)
        num_bytes += len(tokenizer.decode(following, skip_special_tokens=True).encode())
    return {
        "eval_loss": nll / count,
        "eval_perplexity": math.exp(nll / count),
        "eval_bits_per_byte": nll / math.log(2) / num_bytes,
        "eval_num_tokens": count,
        "eval_num_bytes": num_bytes,
        "eval_time_s": 0.2,
    }


def _make_recipe(dataset: Path, num_parameters: int, evaluation: dict) -> dict:
    manifest = json.loads((dataset / "manifest.json").read_text())
    train, validation = (manifest["splits"][split]["num_blocks"] * 64 for split in ("train", "validation"))
    assert validation == evaluation["eval_num_tokens"] + 1  # one shard: only its last position has no target
    where = {"name": "tiny", "folder": str(dataset)}
    return {
        "model": {"config": "model_configs/x.json", "init": "random"},
        "data": {"mixture": [{"dataset": "tiny", "weight": 1.0}], "block_size": BLOCK_SIZE, "permute_labels": False},
        "run": {"samples": {"prompts": ["The river", "Every reader"]}},
        "training": {
            "learning_rate": 1e-3,
            "optim": "adamw_torch_fused",
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "seed": 1,
        },
        "resolved": {
            "num_processes": 1,
            "num_steps": 10,
            "stages": [
                {
                    "name": "main",
                    "num_steps": 10,
                    "num_tokens": 6400,
                    "block_size": BLOCK_SIZE,
                    "tokens_per_step": 640,
                    "gradient_accumulation_steps": 1,
                    "shares": {"tiny": 1.0},
                }
            ],
            "num_tokens": 6400,
            "num_parameters": num_parameters,
            "precision": "fp32",
            "attention": "sdpa",
            "device": "1 x CPU, 2 threads",
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "git_commit": "abc123abc123",
            "datasets": [
                {
                    **where,
                    "fingerprint": manifest["fingerprint"],
                    "num_tokens": train,
                    "weight": 1.0,
                    "licence": "cc0-1.0",
                }
            ],
            "validation": [{**where, "num_tokens": validation}],
            "init": "random",
        },
    }
