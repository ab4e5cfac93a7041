"""Our faster steps beside transformers' own (`run.speed: stock`): the same losses and weights, nothing that waits."""

from __future__ import annotations

import gc
import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from reads import count_reads
from tiny import CONFIG
from transformers import Trainer, default_data_collator
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from clm.fast_steps import QuietCollector

from .conftest import losses, quiet_config, read_metrics

FEW = ("data.tokens=3072", "data.validation=[]", "training.save_strategy=no")  # 6 steps
NO_POINT = {"should_log": False, "should_evaluate": False, "should_save": False}
MIXTRAL = {
    **{k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type")},
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 1.0,
    "attention_dropout": 0.0,
}


def cache_hits() -> int:
    """Graphs that torch.compile found on the disk."""
    counters = torch._dynamo.utils.counters
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def weights_of(run):
    from safetensors.torch import load_file

    return load_file(run / "final" / "model.safetensors")


def assert_same_training(one, other, of_loss=1e-6, of_weights=1e-5):
    assert losses(one) == pytest.approx(losses(other), rel=of_loss)
    a, b = weights_of(one), weights_of(other)
    assert all((a[name] - b[name]).norm() <= of_weights * b[name].norm() for name in b)


@pytest.fixture
def mixtral(tmp_path):
    def override(**changes):
        path = tmp_path / f"mixtral{len(changes)}.json"
        path.write_text(json.dumps({**MIXTRAL, **changes}))
        return f"model.config={path}"

    return override


@pytest.mark.parametrize(
    "overrides",
    [
        ("run.record_blocks=true",),
        ("training.per_device_train_batch_size=2",),
        ("data.document_mask=true",),
        ("run.loss=whole", "training.per_device_train_batch_size=4"),
        ("training.bf16=true", "training.use_cpu=true"),
        pytest.param(("model.attention=eager",), marks=pytest.mark.slow),
        pytest.param(("training.gradient_checkpointing=true",), marks=pytest.mark.slow),
        pytest.param(("training.dataloader_num_workers=2",), marks=pytest.mark.slow),
    ],
    ids=["plain", "accumulation", "documents", "whole", "bf16", "eager", "checkpointing", "workers"],
)
def test_fast_and_stock_train_the_same(train, overrides, monkeypatch):
    monkeypatch.setattr("clm.loss_only.CHUNK_ROWS", 96)  # several chunks, the last one smaller
    fast = train(*FEW, *overrides, name="fast")
    stock = train(*FEW, *(o for o in overrides if "run.loss" not in o), "run.speed=stock", name="stock")
    if "run.record_blocks=true" in overrides:
        assert (fast / "blocks-0.jsonl").read_text() == (stock / "blocks-0.jsonl").read_text(), "the same samples"
    if "training.bf16=true" in overrides:  # sums of other roundings
        assert_same_training(fast, stock, of_loss=1e-3, of_weights=0.05)
    else:
        assert_same_training(fast, stock)


def test_stock_is_transformers_own(train, monkeypatch):
    seen = {}

    def note_step(self, model, inputs, num_items_in_batch=None):
        seen["step"] = seen.get("step", 0) + 1
        seen["inputs"] = sorted(inputs)
        seen["forward"] = model.forward.__func__
        seen["attention"] = model.config._attn_implementation
        return real(self, model, inputs, num_items_in_batch)

    real = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", note_step)
    collated = []
    monkeypatch.setattr("transformers.default_data_collator", lambda f: collated.append(f) or default_data_collator(f))
    train(*FEW, "run.speed=stock")
    assert seen["step"] == len(collated) == 12, "6 steps of 2 micro-batches"
    assert seen["inputs"] == ["input_ids", "labels", "shift_labels"] and seen["attention"] == "sdpa"
    assert seen["forward"] is LlamaForCausalLM.forward
    assert [type(v) for v in collated[0][0].values()] == [list] * 3 and len(collated[0]) == 8
    seen.clear()
    train(*FEW, "run.speed=fast", name="fast")
    assert seen == {}, "fast does not use stock's step"


@pytest.mark.slow
@pytest.mark.parametrize("speeds", [("fast", "stock"), ("stock", "fast")])
def test_a_run_may_change_between_fast_and_stock_at_a_resume(train, speeds):
    short, first, second = ("data.tokens=5120", "run.retention={last: 9}"), *(f"run.speed={speed}" for speed in speeds)
    straight = train(*short, first, name="straight")
    run = train(*short, first, name="changed")
    (run / "final").rename(run / "gone")
    (run / "checkpoint-10").rename(run / "gone-10")
    train(*short, second, name="changed")
    assert_same_training(run, straight)


@pytest.mark.slow
def test_the_router_loss_is_apart_and_does_not_grow_with_accumulation(train, mixtral):
    one = (*FEW, mixtral())
    stock = train(*one, "run.speed=stock", "training.per_device_train_batch_size=16", name="stock")
    fast = train(*one, "training.per_device_train_batch_size=16", name="fast")
    first_stock, first_fast = read_metrics(stock)[0], read_metrics(fast)[0]
    total = first_fast["loss"] + first_fast["router_loss"]  # the coefficient is 1
    assert total == pytest.approx(first_stock["loss"], rel=1e-6)
    assert "router_loss" not in first_stock
    a, b = weights_of(fast), weights_of(stock)
    assert all((a[name] - b[name]).norm() <= 1e-4 * b[name].norm() for name in b)
    # eight micro-batches: stock adds the router loss eight times, ours is their mean
    stock8 = train(*one, "run.speed=stock", "training.per_device_train_batch_size=2", name="stock8")
    fast8 = train(*one, "training.per_device_train_batch_size=2", name="fast8")
    assert read_metrics(fast8)[0]["loss"] == pytest.approx(first_fast["loss"], rel=1e-6), "the cross entropy"
    assert read_metrics(fast8)[0]["router_loss"] == pytest.approx(first_fast["router_loss"], rel=0.1)
    assert read_metrics(stock8)[0]["loss"] > first_stock["loss"] + 5 * first_fast["router_loss"]


@pytest.mark.slow
def test_without_router_loss_every_layout_trains_the_same(train, mixtral):
    quiet = mixtral(router_aux_loss_coef=0.0)
    runs = [
        train(*FEW, quiet, f"training.per_device_train_batch_size={rows}", name=f"rows{rows}") for rows in (2, 4, 16)
    ]
    for run in runs[1:]:
        assert_same_training(run, runs[0])


def test_no_step_between_two_log_points_reads_a_value(train, recipe):
    quiet = ("data.validation=[]", "training.save_strategy=no", "run.spikes={policy: report}", quiet_config(recipe))
    counts = {}
    for num_steps in (5, 15):
        tokens = f"data.tokens={512 * num_steps}"
        with count_reads() as reads:
            train(*quiet, tokens, f"training.logging_steps={num_steps}", name=f"steps{num_steps}")
        counts[num_steps] = reads
    # the rows that the watch for spikes has fetched at the log point, all at once, are on the host
    more = Counter(p for p in counts[15].places if "spikes.py" not in p or ".cpu()" in p) - Counter(counts[5].places)
    assert not more, "as many reads in 15 steps as in 5: those of the start, one log point and the end"
    with count_reads() as every_step:
        train(*quiet, "data.tokens=2560", "training.logging_steps=1", name="logged")
    assert every_step.num_reads > counts[5].num_reads, "the counter counts"


def test_the_collector_of_garbage_is_given_back_and_the_meter_has_measured(train):
    frozen = gc.get_freeze_count()
    run = train(*FEW, "run.peak_tflops=0.001")  # a peak of 10^9 FLOP/s
    assert gc.isenabled() and gc.get_freeze_count() == frozen
    for record in (r for r in read_metrics(run) if "loss" in r):
        # N = 2 (2 x 32 x 32 + 2 x 32 x 16 + 3 x 32 x 64) + 384 x 32, 2 layers, width 32, T = 32
        assert record["mfu"] == pytest.approx(record["tokens_per_s"] * (6 * 30_720 + 12 * 2 * 32 * 32) / 1e9)
        assert 0 < record["step_p50_s"] <= record["step_p95_s"] and 0 <= record["input_wait_fraction"] < 1


def test_what_an_evaluation_brought_is_looked_through_once():
    quiet, step = QuietCollector(), SimpleNamespace(**NO_POINT)
    point = SimpleNamespace(**NO_POINT | {"should_log": True})
    try:
        quiet.on_step_end(None, None, step)
        before, kept = gc.get_freeze_count(), [[] for _ in range(1000)]  # what other threads hold comes and goes
        quiet.on_step_end(None, None, point)
        assert gc.get_freeze_count() < before + len(kept) // 2, "at a log point only what is new is looked through"
        quiet.on_evaluate(None, None, step)
        quiet.on_step_end(None, None, step)
        assert gc.get_freeze_count() < before + len(kept) // 2, "not between two points"
        quiet.on_step_end(None, None, point)
        assert gc.get_freeze_count() > before + len(kept) // 2
    finally:
        quiet.thaw()
    assert gc.get_freeze_count() == 0 and gc.isenabled()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_evaluates_resumes_and_saves_as_one_that_is_not(train, recipe, any_order_afterwards):
    short = (quiet_config(recipe), "data.tokens=5120", "training.eval_steps=4", "run.z_loss=0.01")
    plain = train(*short, name="plain")
    graphs = torch._dynamo.utils.counters["stats"]
    compiled_before = graphs["unique_graphs"]
    # Inductor adds up the gradient of the embedding by atomic additions, in any order, unless it must not
    compiled = (*short, "training.torch_compile=true", "training.full_determinism=true")
    run = train(*compiled, name="compiled")
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    evaluated = [[r["eval_loss"] for r in read_metrics(each) if "eval_loss" in r] for each in (run, plain)]
    assert len(evaluated[0]) == 4 and evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
    assert weights_of(run).keys() == weights_of(plain).keys(), "no _orig_mod."
    before = losses(run)
    (run / "final").rename(run / "gone")
    (run / "checkpoint-10").rename(run / "gone-10")
    torch._dynamo.reset()  # a process that starts has compiled nothing yet
    hits = cache_hits()
    train(*compiled, name="compiled")
    assert losses(run) == before
    assert cache_hits() > hits, "what was compiled for the first start serves the second"
    # graphs of training and of evaluation, and no third: no shape was made symbolic, nothing was compiled anew
    assert graphs["unique_graphs"] - compiled_before <= 4, "2 in each of the two starts"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_after_the_first_step_no_evaluation_makes_the_training_step_compile_again(train, recipe, monkeypatch):
    """Evaluation has other rows than training, so there are two graphs; going to and fro makes no third."""
    from torch._dynamo.utils import counters

    from clm.trainer import ClmTrainer

    seen: dict[str, list[tuple[int, int]]] = {"training_step": [], "evaluate": []}

    def counting(name):
        real = getattr(ClmTrainer, name)

        def call(self, *args, **kwargs):
            result = real(self, *args, **kwargs)
            seen[name].append((self.state.global_step, counters["stats"]["unique_graphs"]))
            return result

        return call

    for name in seen:
        monkeypatch.setattr(ClmTrainer, name, counting(name))
    torch._dynamo.reset()
    other_shape = ("training.per_device_eval_batch_size=4", "data.tokens=5120", "training.eval_steps=3")
    train(quiet_config(recipe), *other_shape, "training.torch_compile=true", "training.save_strategy=no")
    assert [step for step, _ in seen["evaluate"]] == [0, 3, 6, 9, 10]
    at_start, graphs = seen["evaluate"][0][1], [graphs for _, graphs in seen["training_step"]]
    assert graphs[0] == at_start + 1, "one graph for training beside that of evaluation"
    assert set(graphs) == {graphs[0]} and len(graphs) == 20, "and none in the 20 micro-steps around four evaluations"
    assert {graphs for _, graphs in seen["evaluate"][1:]} == {graphs[0]}


def test_what_the_plan_says(plan_lines):
    assert "loss         chunked, without logits: not compiled, so it is faster and smaller" in plan_lines()
    assert "loss         of the model's own forward: run.speed is stock" in plan_lines("run.speed=stock")
    assert "attention    sdpa_causal: auto: rows are plainly causal" in plan_lines()
    assert "compiled     no: on a CPU" in plan_lines()
    assert "loss         whole, without logits: torch.compile fuses it" in plan_lines("training.torch_compile=true")


@pytest.fixture
def plan_lines(recipe, capsys):
    import run_clm

    def lines(*overrides):
        run_clm.main([str(recipe), *overrides, "--dry-run"])
        return capsys.readouterr().out

    return lines


def test_a_loss_that_cannot_be_is_refused(plan_lines):
    from data_prep.errors import UserError

    for overrides, text in (
        (["run.loss=chunked", "run.speed=stock"], "run.loss is chunked but run.speed is stock"),
        (["run.loss=chunked", "training.torch_compile=true"], "run.loss is chunked but torch.compile fuses it"),
        (["model.fp8=true"], "model.fp8 is true but there is no CUDA GPU"),
        (["model.fp8=true"], "model.fp8 is true but the model has 30,880 parameters: below 1,000,000,000"),
        (["model.fp8=true", "data.document_mask=true"], "a micro-batch has one scale"),
        (["run.speed=quick"], "run.speed is 'quick', unknown"),
    ):
        with pytest.raises(UserError, match=text):
            plan_lines(*overrides)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "more", [(), ("run.optimizer=muon", "run.ema={decay: 0.9}", "run.z_loss=0.001")], ids=["plain", "muon, EMA, z-loss"]
)
def test_on_a_gpu_nothing_waits_between_two_log_points(train, recipe, monkeypatch, more):
    """With signal handling and the watch for spikes on, as in every run."""
    from clm.fast_steps import FastSteps

    real = FastSteps.training_step

    def strict_step(self, *args, **kwargs):
        step = self.state.global_step
        # the first steps compile and warm up; a log point may wait
        torch.cuda.set_sync_debug_mode("error" if 5 < step < 19 else "default")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(FastSteps, "training_step", strict_step)
    try:
        quiet = (quiet_config(recipe), "data.validation=[]", "training.save_strategy=no", "training.logging_steps=20")
        train(*quiet, *more, "run.spikes={policy: report}", "training.bf16=true", "training.dataloader_num_workers=1")
    finally:
        torch.cuda.set_sync_debug_mode("default")
