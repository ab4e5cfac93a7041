"""The benchmarks of speed run as documented, and their losses are those of the plain Trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import CONFIG

from benchmarks.time_to_loss import tokens_to

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_losses_are_those_of_the_plain_trainer(run_cli):
    result = run_cli(["benchmarks/parity.py", "--steps", "40"])
    assert result.code == 0, result.stderr
    records = {record["variant"]: record for record in map(json.loads, _json_lines(result.stdout))}
    assert records["ours"]["steps"] == 40 and records["ours"]["largest_difference"] <= 1e-5
    assert records["ours_stock"]["largest_difference"] == 0.0, "run.speed: stock is the plain Trainer's own training"


@pytest.mark.slow
def test_throughput_prints_a_line_per_variant_and_repetition(run_cli):
    small = ["--models", "llama_demo:64", "--variants", "ours_eager", "bare_eager", "stock", "stock_best"]
    few = ["--tokens", "128", "--steps", "2", "--repeats", "2", "--warm-up", "1"]
    result = run_cli(["benchmarks/throughput.py", "--cpu", *small, *few])
    assert result.code == 0, result.stderr
    records = [json.loads(line) for line in _json_lines(result.stdout)]
    assert [r["variant"] for r in records] == ["ours_eager", "bare_eager", "stock", "stock_best"] * 2, "in turns"
    assert all(r["rows"] * r["accumulation"] == 2 for r in records), "as many tokens per step"
    assert "stock by 128 tokens" in result.stderr and "stock by 64 tokens" in result.stderr
    assert all(r["model"] == "llama_demo" and r["tokens_per_s"] > 0 for r in records)
    assert all(0 < r["share_of_matmul_limit"] < 2 and "mfu" not in r and r["compile_s"] >= 0 for r in records)
    assert all(any("scaled_dot_product" in kernel for kernel in r["attention_kernels"]) for r in records)
    assert "/ stock" in result.stderr


@pytest.mark.slow
def test_the_speed_after_an_evaluation_is_set_beside_that_of_a_process_without(run_cli):
    few = ["--models", "llama_demo:64", "--tokens", "128", "--steps", "1", "--repeats", "2", "--warm-up", "1"]
    result = run_cli(["benchmarks/throughput.py", "--cpu", "--evaluation", "--variants", "ours_eager", *few])
    assert result.code == 0, result.stderr
    records = [json.loads(line) for line in _json_lines(result.stdout)]
    assert [(r["process"], r["when"]) for r in records[::2]] == [("evaluating", "before")] * 2 + [
        ("evaluating", "after")
    ] * 2
    assert "medians of 2 pairs" in result.stderr


@pytest.mark.slow
def test_the_loop_alone_is_timed_of_ours_bare_and_stock(run_cli):
    result = run_cli(["benchmarks/loop_overhead.py", "--steps", "2", "--repeats", "1"])
    assert result.code == 0, result.stderr
    records = [json.loads(line) for line in _json_lines(result.stdout)]
    assert [record["variant"] for record in records] == ["ours", "bare", "stock"]


@pytest.mark.slow
def test_the_parts_of_a_step_are_measured_beside_the_whole(run_cli):
    few = ["--tokens", "128", "--repeats", "2", "--seconds", "0.01"]
    result = run_cli(["benchmarks/micro.py", "--cpu", "--models", "llama_demo:64", *few])
    assert result.code == 0, result.stderr
    limits, *records = [json.loads(line) for line in _json_lines(result.stdout)]
    assert limits["matmul_tflops"] > 0 and limits["torch"]
    measured = [r for r in records if "skipped" not in r]
    parts = {"gemm", "attention", "loss", "elementwise", "input", "optimizer", "step"}
    assert {r["part"] for r in measured} == parts and all(r["ms"] > 0 for r in measured)
    losses = [r["variant"] for r in measured if r["part"] == "loss"]
    assert len(losses) == 2 * len(set(losses)) and losses[: len(losses) // 2] == losses[len(losses) // 2 :], "in turns"
    # q and o 128 x 128, twice in each of 4 layers; forward and both of backward: 3 x 2 x 128 tokens x 128 x 128
    gemm = next(r for r in measured if r["variant"] == "q and o 128 x 128")
    assert gemm["count"] == 8 and gemm["tflops"] == pytest.approx(6 * 128**3 / gemm["ms"] / 1e9, abs=2e-3)
    assert all(r["skipped"] for r in records if "ms" not in r)
    assert "whole step" in result.stderr and "rest" in result.stderr


@pytest.mark.slow
def test_tokens_to_a_loss_are_those_of_real_runs(run_cli, prepared, tmp_path):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(CONFIG))
    what = ["--cpu", "--config", config, "--dataset", prepared.folder, "--seeds", "1", "--learning-rates", "1e-2"]
    few = ["--tokens", "10K", "--tokens-per-step", "512", "--block-size", "32", "--budgets", "1.0"]
    result = run_cli(["benchmarks/time_to_loss.py", *what, *few, "--validation-tokens", "2K"])
    assert result.code == 0, result.stderr
    stock, ours = [json.loads(line) for line in _json_lines(result.stdout)]
    assert (stock["variant"], ours["variant"]) == ("stock", "ours") and stock["tokens"] == ours["tokens"] == 10_240
    assert 0 < ours["eval_loss"] < 6 and 0 < stock["eval_loss"] < 6 and stock["train_s"] > 0
    assert "of stock's" in result.stderr


@pytest.mark.slow
def test_the_residual_stream_in_bf16_loses_as_bf16_does(run_cli):
    result = run_cli(["benchmarks/parity.py", "--steps", "10", "--bf16", "--variants", "ours", "ours_residual"])
    assert result.code == 0, result.stderr
    ours, residual = map(json.loads, _json_lines(result.stdout))
    assert 0 < ours["largest_difference"] < 5e-3 and 0 < residual["largest_difference"] < 0.02
    assert residual["last_loss"] != ours["last_loss"], "the switch does something"


@pytest.mark.slow
def test_every_benchmark_says_what_it_measures_and_how_it_is_started(run_cli):
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        if "description=__doc__" in (text := path.read_text(encoding="utf-8")):
            result = run_cli([path, "--help"])
            assert result.code == 0, result.stderr
            assert text[3:].partition("\n")[0] in result.stdout.replace("\n", " "), path.name


def test_the_tokens_that_reach_a_loss_lie_between_two_budgets():
    points = [(400, 2.0), (100, 4.0), (200, 3.0)]
    assert tokens_to(3.0, points) == pytest.approx(200)
    assert tokens_to(2.5, points) == pytest.approx(200 * 2**0.5), "half of the way in log(tokens)"
    assert tokens_to(4.5, points) == 100 and tokens_to(1.9, points) is None


def _json_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("{")]
