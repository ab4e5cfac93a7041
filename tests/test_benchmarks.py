"""The benchmarks of speed run as documented, and their losses are those of the plain Trainer."""

from __future__ import annotations

import json

import pytest


@pytest.mark.slow
def test_losses_are_those_of_the_plain_trainer(run_cli):
    result = run_cli(["benchmarks/parity.py", "--steps", "40"])
    assert result.code == 0, result.stderr
    records = {record["variant"]: record for record in map(json.loads, _json_lines(result.stdout))}
    assert records["ours"]["steps"] == 40 and records["ours"]["largest_difference"] <= 1e-5
    assert records["ours_stock"]["largest_difference"] == 0.0, "run.speed: stock is the plain Trainer's own training"


@pytest.mark.slow
def test_throughput_prints_a_line_per_variant_and_repetition(run_cli):
    small = ["--models", "llama_demo:64", "--variants", "ours_eager", "bare_eager", "stock"]
    few = ["--tokens", "128", "--steps", "2", "--repeats", "2", "--warm-up", "1"]
    result = run_cli(["benchmarks/throughput.py", "--cpu", *small, *few])
    assert result.code == 0, result.stderr
    records = [json.loads(line) for line in _json_lines(result.stdout)]
    assert [r["variant"] for r in records] == ["ours_eager", "bare_eager", "stock"] * 2, "in turns"
    assert all(r["model"] == "llama_demo" and r["tokens_per_s"] > 0 for r in records)
    assert "/ stock" in result.stderr


def _json_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("{")]
