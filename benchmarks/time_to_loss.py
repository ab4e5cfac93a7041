"""How many tokens and seconds until the loss that the plain Trainer's AdamW ends at? Muon + WSD beside AdamW + cosine.

    make prep DATASET=stdlib
    python benchmarks/time_to_loss.py --cpu                                    the demo's model, some minutes
    python benchmarks/time_to_loss.py --dataset fineweb --tokens 100M --learning-rates 3e-4 6e-4 1e-3      one GPU

In: a prepared dataset with a validation split, a model config. Out: one JSON line per run on stdout, a table on stderr.
Every run is run_clm.py with a recipe; all have the same data, order, global batch, first weights and validation tokens:

    stock       `run.speed: stock`: transformers' training step, AdamW, cosine to 0; of the given learning rates the one
                whose last losses are the lowest on average counts, for all seeds
    ours_adamw  the same recipe with `run.speed: fast`: what the loop alone gives
    ours        `run.optimizer: muon`, warm-up, stable, decay to 0

The loss that counts is the validation loss at the end of a run. Since a schedule ends at its last step, ours is trained
from the beginning for each share of stock's tokens in --budgets; between the two nearest ones the tokens that reach the
target are interpolated, linear in the logarithm of tokens. Seconds are of training steps, without evaluation and
compilation: tokens / the median of tokens per second after the first log point.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # it is started as a file, too

from data_prep.manifest import load_manifest
from data_prep.paths import dataset_folder
from data_prep.sizes import parse_count

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("stock", "ours_adamw", "ours")
NUM_LOG_POINTS = 20


def main() -> None:
    arguments = parse_arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="time-to-loss-") as folder:
        for seed in arguments.seeds:  # all variants of a seed before the next one's: A B A B
            for variant, rate, tokens in list_runs(arguments):
                records.append(train(Path(folder), variant, seed, rate, tokens, arguments))
                print(json.dumps(records[-1]), flush=True)
    print(tabulate(records), file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """The command line, with the defaults of the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="fp32 on the CPU, the demo's model")
    parser.add_argument("--config", help="of model_configs/ (llama_demo on a CPU, llama_170m on a GPU), or a .json")
    parser.add_argument("--dataset", default="stdlib", help="prepared with that model's tokenizer; default: stdlib")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["stock", "ours"], help="stock is needed")
    parser.add_argument("--tokens", type=parse_count, help="of stock's runs (400K on a CPU, 100M on a GPU)")
    parser.add_argument("--tokens-per-step", type=parse_count, help="(2,048 on a CPU, 131,072 on a GPU)")
    parser.add_argument("--block-size", type=int, help="default: the prepared one, at most 512")
    parser.add_argument("--rows", type=int, help="of a micro-batch (all of a step on a CPU, 65,536 tokens on a GPU)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--learning-rates", nargs="+", type=float, help="of stock, the best one counts")
    parser.add_argument("--muon-learning-rate", type=float, default=0.02)
    parser.add_argument("--adamw-learning-rate", type=float, help="of what Muon leaves; default: the middle of stock's")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.65, 0.8], help="shares of --tokens")
    parser.add_argument("--decay", type=float, default=0.4, help="share of ours that decays; default: 0.4")
    parser.add_argument("--validation-tokens", type=parse_count, default=2_000_000)
    parser.add_argument("--stock-compiled", action="store_true", help="torch.compile for stock too")
    arguments = parser.parse_args()
    if "stock" not in arguments.variants:
        parser.error("--variants has no stock, whose loss is the target")
    is_cpu = arguments.cpu
    named = arguments.config or ("llama_demo" if is_cpu else "llama_170m")
    arguments.config = named if named.endswith(".json") else str(ROOT / "model_configs" / f"{named}.json")
    arguments.tokens = arguments.tokens or (400_000 if is_cpu else 100_000_000)
    arguments.tokens_per_step = arguments.tokens_per_step or (2048 if is_cpu else 131_072)
    arguments.learning_rates = arguments.learning_rates or ([1e-3, 3e-3] if is_cpu else [3e-4, 6e-4, 1e-3])
    rates = sorted(arguments.learning_rates)
    arguments.adamw_learning_rate = arguments.adamw_learning_rate or rates[len(rates) // 2]
    folder = dataset_folder(arguments.dataset)
    if not (folder / "manifest.json").is_file():
        parser.error(f"{folder} is not prepared. Run make prep DATASET={arguments.dataset}")
    prepared = load_manifest(folder).block_size
    arguments.block_size = arguments.block_size or min(512, prepared)
    most = arguments.tokens_per_step if is_cpu else min(65_536, arguments.tokens_per_step)
    arguments.rows = arguments.rows or max(prepared, most) // arguments.block_size
    return arguments


def list_runs(arguments: argparse.Namespace) -> list[tuple[str, float, int]]:
    """(variant, learning rate of AdamW, tokens) of each run of a seed."""
    runs = []
    for variant in arguments.variants:
        if variant == "ours":
            runs += [(variant, arguments.adamw_learning_rate, round(b * arguments.tokens)) for b in arguments.budgets]
        else:
            runs += [(variant, rate, arguments.tokens) for rate in arguments.learning_rates]
    return runs


def make_recipe(variant: str, seed: int, rate: float, tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe of one run; everything that is not the variant's is the same in all."""
    num_steps = math.ceil(tokens / arguments.tokens_per_step)
    run: dict[str, Any] = {"preflight": False, "speed": "stock" if variant == "stock" else "fast"}
    training: dict[str, Any] = {
        "per_device_train_batch_size": arguments.rows,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, num_steps // NUM_LOG_POINTS),
        "eval_steps": num_steps,  # and before the first step
        "save_strategy": "no",
        "seed": seed,
        "use_cpu": arguments.cpu,
    }
    if variant == "ours":
        run |= {"optimizer": "muon", "muon": {"learning_rate": arguments.muon_learning_rate, "weight_decay": 0.0}}
        kwargs = {"num_decay_steps": arguments.decay, "min_lr_ratio": 0.0}
        training |= {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": kwargs}
    if variant == "stock" and arguments.stock_compiled:
        training["torch_compile"] = True
    return {
        "model": {"config": arguments.config},
        "data": {
            "mixture": [{"dataset": arguments.dataset}],
            "block_size": arguments.block_size,
            "tokens": tokens,
            "tokens_per_step": arguments.tokens_per_step,
            "max_epochs": 1e9,
            "validation": [{"dataset": arguments.dataset, "tokens": arguments.validation_tokens}],
        },
        "run": run,
        "training": training,
    }


def train(
    folder: Path, variant: str, seed: int, rate: float, tokens: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train one run by run_clm.py; what came of it.

    Raises:
        SystemExit: the run failed; with the end of what it said.
    """
    name = f"{variant}-{seed}-{rate:g}-{tokens}"
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(variant, seed, rate, tokens, arguments)), encoding="utf-8")
    environment = {
        **os.environ,
        "RUNS_DIR": str(folder / "runs"),
        **({"CUDA_VISIBLE_DEVICES": ""} if arguments.cpu else {}),
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_clm.py"), str(recipe)], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_s"] for line in lines if "loss" in line]
    tokens_per_s = statistics.median(rates[1:] or rates)
    evaluation = [line for line in lines if "eval_loss" in line][-1]
    return {
        "variant": variant,
        "model": Path(arguments.config).stem,
        "seed": seed,
        "learning_rate": rate,
        "tokens": evaluation["tokens"],
        "eval_loss": evaluation["eval_loss"],
        "tokens_per_s": round(tokens_per_s, 1),
        "train_s": round(evaluation["tokens"] / tokens_per_s, 2),
    }


def tokens_to(target: float, points: list[tuple[int, float]]) -> float | None:
    """The tokens at which the loss reaches the target, linear in log(tokens) between two (tokens, loss) points.

    None where no point reaches it; the first point's tokens where that one does already.
    """
    points = sorted(points)
    before: tuple[int, float] | None = None
    for tokens, loss in points:
        if loss <= target:
            if before is None or before[1] == loss:
                return float(tokens)
            share = (before[1] - target) / (before[1] - loss)
            return math.exp(math.log(before[0]) + share * (math.log(tokens) - math.log(before[0])))
        before = (tokens, loss)
    return None


def tabulate(records: list[dict[str, Any]]) -> str:
    """Per seed and over all: the target, and what each variant needs for it."""
    stock = [r for r in records if r["variant"] == "stock"]
    rates = {r["learning_rate"] for r in stock}
    best = min(rates, key=lambda rate: statistics.mean(r["eval_loss"] for r in stock if r["learning_rate"] == rate))
    lines = [f"\nstock's best learning rate: {best:g} of {', '.join(f'{rate:g}' for rate in sorted(rates))}"]
    lines.append("variant     seed  target loss      tokens  of stock's   seconds  of stock's")
    shares: dict[str, list[tuple[float, float]]] = {}
    for baseline in (r for r in stock if r["learning_rate"] == best):
        seed, target = baseline["seed"], baseline["eval_loss"]
        for variant in dict.fromkeys(r["variant"] for r in records):
            mine = [r for r in records if r["variant"] == variant and r["seed"] == seed]
            if variant != "ours":
                mine = [r for r in mine if r["learning_rate"] == best]
            if variant == "ours_adamw":  # the same losses but for rounding
                needed: float | None = mine[0]["tokens"]
            else:
                needed = tokens_to(target, [(r["tokens"], r["eval_loss"]) for r in mine])
            line = f"{variant:<11} {seed:>4}  {target:>11.4f}"
            if needed is None:
                lowest = min(mine, key=lambda r: r["eval_loss"])
                lines.append(f"{line}  not reached: {lowest['eval_loss']:.4f} at {lowest['tokens']:,} tokens")
                continue
            is_first = variant == "ours" and needed == min(r["tokens"] for r in mine)
            seconds = needed / statistics.median(r["tokens_per_s"] for r in mine)
            shares.setdefault(variant, []).append((needed / baseline["tokens"], seconds / baseline["train_s"]))
            line += (
                f"  {needed:>10,.0f}  {shares[variant][-1][0]:>10.3f}  {seconds:>8.1f}  {shares[variant][-1][1]:>10.3f}"
            )
            lines.append(line + ("  or less: its smallest budget is enough" if is_first else ""))
    for variant, pairs in shares.items():
        tokens, seconds = (statistics.mean(pair[i] for pair in pairs) for i in (0, 1))
        lines.append(f"{variant:<11} mean{'':>27}  {tokens:>10.3f}  {'':>8}  {seconds:>10.3f}  of {len(pairs)} seeds")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
