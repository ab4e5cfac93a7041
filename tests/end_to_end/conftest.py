"""A recipe small enough to train in a second, on the prepared tiny corpus, and ways to run it as a user does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "attention_dropout": 0.1,  # so that a wrong random state after a resume shows
}

RECIPE = """\
model:
  config: {config}
data:
  mixture: [{{dataset: {dataset}, weight: 1.0}}]
  block_size: 32
  tokens: 10_240
  tokens_per_step: 512
  validation: [{{dataset: {dataset}, tokens: 2048}}]
training:
  per_device_train_batch_size: 8
  learning_rate: 1e-2
  lr_scheduler_type: cosine_with_min_lr
  lr_scheduler_kwargs: {{min_lr_rate: 0.1}}
  warmup_steps: 0.1
  logging_steps: 1
  eval_steps: 10
  save_steps: 5
  seed: 3
"""


@pytest.fixture
def recipe(tmp_path: Path, prepared, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiny.yaml: 20 steps of 512 tokens, checkpoints every 5; runs lie under tmp_path/runs."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")  # a run sets them for its process; here the next test is in the same one
        monkeypatch.delenv(name)
    config = tmp_path / "tiny_config.json"
    config.write_text(json.dumps(CONFIG))
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(config=config, dataset=prepared.folder))
    return path


@pytest.fixture
def train(recipe: Path) -> Callable[..., Path]:
    """Train in this process: `train("training.run_name=b", ...) -> the run's folder`."""

    def run(*overrides: str, name: str = "tiny") -> Path:
        import run_clm

        run_clm.main([str(recipe), *overrides, f"training.run_name={name}"])
        return Path(os.environ["RUNS_DIR"]) / name

    return run


def read_metrics(run: Path) -> list[dict]:
    """metrics.jsonl, every line whole."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def quiet_config(recipe: Path) -> str:
    """An override that switches dropout off, so that only the order of additions can differ between layouts."""
    source = recipe.with_name("tiny_config.json")
    path = source.with_name("quiet_config.json")
    path.write_text(json.dumps({**json.loads(source.read_text()), "attention_dropout": 0.0}))
    return f"model.config={path}"


def losses(run: Path) -> dict[int, float]:
    """Step -> training loss."""
    return {record["step"]: record["loss"] for record in read_metrics(run) if "loss" in record}
