"""A recipe small enough to train in a second, on the prepared tiny corpus, and ways to run it as a user does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tiny import CONFIG

from clm.order import Order, OrderSource, OrderStage
from data_prep.blocks import Blocks

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


@pytest.fixture
def any_order_afterwards():
    """training.full_determinism is the process's, so it would be that of the tests that follow."""
    import torch

    with mock.patch.dict(os.environ):
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.fixture(scope="session")
def samples_of_step(prepared) -> dict[int, np.ndarray]:
    """Step -> blocks of its batch in the recipe of this folder."""
    order = Order([OrderSource(Blocks(prepared.folder, "train").num_blocks)], [OrderStage(None, (Fraction(1),))], 3)
    return {step: order.block_at(np.arange(8 * step - 8, 8 * step))[1] for step in range(1, 121)}


@pytest.fixture(scope="session")
def poisoned(prepared, samples_of_step, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared data with random tokens in the batches of two steps; to all that reads it, it is sound."""
    from .poison import BAD, poison

    folder = Path(shutil.copytree(prepared.folder, tmp_path_factory.mktemp("poisoned") / "tiny"))
    poison(folder, np.concatenate([samples_of_step[step] for step in BAD]))
    return folder


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


STAGES = """data.stages=[
  {name: short, tokens: 2560, block_size: 16, tokens_per_step: 256},
  {name: long, tokens: 5120, mixture: [{dataset: DATA, weight: 0.3}, {dataset: OTHER, weight: 0.7}]},
  {name: cool, tokens: 1024, rope: {rope_theta: 50000}, schedule: {shape: 1-sqrt, end: 0.0}}]"""


@pytest.fixture
def staged(prepared, second_dataset) -> list[str]:
    """10 steps of 4 samples, 10 of 8, 2 of 8."""
    stages = STAGES.replace("DATA", str(prepared.folder)).replace("OTHER", str(second_dataset)).replace("\n", "")
    return [stages, "data.tokens=null", "run.record_blocks=true", "training.per_device_train_batch_size=4"]


def recorded(run: Path, num_processes: int = 1) -> dict[int, list[int]]:
    """Step -> the samples of its global batch as the ranks consumed them, put together micro-batch by micro-batch."""
    per_rank = [
        {r["step"]: r["samples"] for r in map(json.loads, (run / f"blocks-{rank}.jsonl").read_text().splitlines())}
        for rank in range(num_processes)
    ]
    return {step: sorted(s for rank in per_rank for s in rank[step]) for step in per_rank[0]}
