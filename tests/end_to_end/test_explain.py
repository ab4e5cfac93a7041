"""explain shows what a run really consumed: compared with what every process wrote down while it trained."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clm.__main__ import main
from clm.block_record import block_record_path
from clm.explain import explain_step, open_text

from .conftest import losses, quiet_config

ROOT = Path(__file__).parents[2]
RARELY = ["training.eval_steps=1000", "training.save_steps=1000", "run.record_blocks=true"]


def check_every_step(run: Path, num_steps: int, num_processes: int) -> None:
    """For each process and step: explain's samples in order, and the SHA-256 of explain's tokens."""
    text = open_text(run)
    for rank in range(num_processes):
        lines = [json.loads(line) for line in block_record_path(run, rank).read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, num_steps + 1))
        for line in lines:
            explanation = explain_step(text, line["step"], None)
            mine = [block for block in explanation.blocks if block.seen_as["rank"] == rank]
            assert [block.seen_as["sample"] for block in mine] == line["samples"]
            tokens = np.concatenate([block.tokens[:-1] for block in mine])
            assert hashlib.sha256(tokens.astype(np.int64).tobytes()).hexdigest() == line["sha256"]


def test_the_tokens_of_100_steps_are_those_that_the_run_consumed(train, recipe, second_dataset):
    mixture = recipe.read_text().split("mixture: [")[1].split("}]")[0]
    both = f"data.mixture=[{mixture}}}, {{dataset: {second_dataset}, weight: 0.5}}]"
    run = train(both, "data.tokens=51_200", "training.per_device_train_batch_size=4", *RARELY)
    check_every_step(run, 100, 1)


def test_the_mean_of_the_losses_is_the_loss_that_training_logged(train, recipe, capsys):
    run = train(quiet_config(recipe), "data.tokens=5120")
    explanation = explain_step(open_text(run), 6, run / "checkpoint-5")
    mean = np.concatenate([block.losses for block in explanation.blocks]).mean()
    assert mean == pytest.approx(losses(run)[6], rel=1e-5)
    capsys.readouterr()
    assert main(["explain", str(run), "--step", "6"]) == 0
    out = capsys.readouterr().out
    assert (
        f"loss in metrics.jsonl  {losses(run)[6]:.4f}" in out and f"{mean:.4f} nats on average over 512 targets" in out
    )
    assert "under checkpoint-5, 1 step before it" in out


@pytest.mark.slow
def test_two_processes_consumed_what_explain_gives_to_each(recipe):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run_clm.py"]
    overrides = ["training.per_device_train_batch_size=4", "training.run_name=two", *RARELY]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(recipe), *overrides], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_every_step(Path(os.environ["RUNS_DIR"]) / "two", 20, 2)
