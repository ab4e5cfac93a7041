"""All that makes a run fast, switched on together: trained, evaluated, resumed and saved as each of it is alone."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from reads import count_reads
from safetensors.torch import load_file

from .conftest import losses, quiet_config, read_metrics
from .test_speed import MIXTRAL

# 10 steps of 2 micro-batches, evaluated at 0, 4, 8 and 10, saved at 5 and 10.
SHORT = ("data.tokens=5120", "training.eval_steps=4", "run.retention={last: 9}", "run.record_blocks=true")
PRECISION = ("training.bf16=true", "training.use_cpu=true", "model.residual_dtype=bf16")
TRAINING = (
    "run.optimizer=muon",
    "run.muon={learning_rate: 0.01, adjust: match_rms_adamw}",
    "run.z_loss=0.001",
    "run.ema={decay: 0.9}",
    "run.spikes={policy: rollback}",
    "training.lr_scheduler_type=warmup_stable_decay",
    "training.lr_scheduler_kwargs={decay_type: 1-sqrt, min_lr_ratio: 0.1}",
    "training.warmup_steps=0.2",
    "run.decay_tokens=1536",
    "training.gradient_checkpointing=true",
)
# Inductor adds up the gradient of the embedding by atomic additions, in any order, unless it must not
COMPILED = ("training.torch_compile=true", "training.full_determinism=true")


def numbers(run: Path) -> dict[str, list[float]]:
    """All that metrics.jsonl says and that does not depend on the clock."""
    names = ("loss", "z_loss", "router_loss", "learning_rate", "grad_norm", "eval_loss", "eval_ema_loss")
    return {name: [r[name] for r in read_metrics(run) if name in r] for name in names}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """A saved model."""
    return load_file(folder / "model.safetensors")


def assert_resumed_bit_by_bit(train, overrides) -> Path:
    """Train, take away what came after step 5, train again; returns the run."""
    run = train(*overrides, name="run")
    straight = numbers(run), tensors(run / "final"), tensors(run / "final-ema"), (run / "blocks-0.jsonl").read_text()
    for name in ("final", "final-ema", "checkpoint-10"):
        (run / name).rename(run / f"gone-{name}")
    train(*overrides, name="run")
    again = numbers(run), tensors(run / "final"), tensors(run / "final-ema"), (run / "blocks-0.jsonl").read_text()
    assert again[0] == straight[0] and again[3] == straight[3]
    for one, other in zip(again[1:3], straight[1:3], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert len(straight[0]["loss"]) == 10 and len(straight[0]["eval_loss"]) == len(straight[0]["eval_ema_loss"]) == 4
    return run


def assert_saved_plainly(run: Path, stock: Path) -> None:
    """Every saved model has the names and the config of a stock run's; nothing of ours or of torch.compile."""
    names = tensors(stock / "final").keys()
    for folder in ("final", "final-ema", "checkpoint-5", "checkpoint-5/ema", "checkpoint-10", "gone-checkpoint-10/ema"):
        assert tensors(run / folder).keys() == names, folder
        config = (run / folder / "config.json").read_text()
        assert not any(ours in config for ours in ("sdpa_causal", "grouped_mm_autocast", "loss_only", "_orig_mod"))
    assert json.loads((run / "final" / "config.json").read_text()) == json.loads(
        (stock / "final" / "config.json").read_text()
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_all_switches_together_compiled(train, recipe, any_order_afterwards):
    together = (*SHORT, quiet_config(recipe), *PRECISION, *TRAINING)
    stock = train(*SHORT, quiet_config(recipe), "run.speed=stock", name="stock")
    eager = train(*together, name="eager")
    run = assert_resumed_bit_by_bit(train, (*together, *COMPILED))
    assert_saved_plainly(run, stock)
    assert (run / "blocks-0.jsonl").read_text() == (stock / "blocks-0.jsonl").read_text(), "the same samples"
    # of the same weights the cross entropy is stock's, but for bf16; later the optimizers differ
    assert losses(run)[1] == pytest.approx(losses(stock)[1], rel=2e-3)
    assert numbers(run)["eval_loss"][0] == pytest.approx(numbers(stock)["eval_loss"][0], rel=2e-3)
    for name, values in numbers(eager).items():
        assert numbers(run)[name] == pytest.approx(values, rel=0.02), f"{name}: chunked and not compiled"


@pytest.mark.slow
def test_with_all_switches_no_step_between_two_log_points_reads_a_value(train, recipe):
    counts = {}
    for num_steps in (5, 15):
        length = (f"data.tokens={512 * num_steps}", f"training.logging_steps={num_steps}")
        quiet = (quiet_config(recipe), *PRECISION, *TRAINING, "data.validation=[]", "training.save_strategy=no")
        with count_reads() as counts[num_steps]:
            train(*quiet, "run.spikes={policy: report}", *length, name=f"steps{num_steps}")
    # the rows that the watch for spikes has fetched at the log point, all at once, are on the host
    more = Counter(p for p in counts[15].places if "spikes.py" not in p or ".cpu()" in p) - Counter(counts[5].places)
    assert not more


@pytest.mark.slow
def test_all_switches_together_on_a_mixture_of_experts_with_masked_documents(train, recipe, tmp_path):
    config = tmp_path / "mixtral.json"
    config.write_text(json.dumps({**MIXTRAL, "router_aux_loss_coef": 0.02}))
    masked = (*SHORT, f"model.config={config}", "data.document_mask=true")
    stock = train(*masked, "run.speed=stock", name="stock")
    run = assert_resumed_bit_by_bit(train, (*masked, *PRECISION, *TRAINING))
    assert_saved_plainly(run, stock)
    assert len(numbers(run)["router_loss"]) == 10
    assert numbers(run)["eval_loss"][0] == pytest.approx(numbers(stock)["eval_loss"][0], rel=2e-3)
    # stock adds the router loss, about 2 with two of four experts, in each of two micro-batches
    router = 2 * 0.02 * numbers(run)["router_loss"][0]
    assert losses(run)[1] + router == pytest.approx(losses(stock)[1], rel=2e-3)
