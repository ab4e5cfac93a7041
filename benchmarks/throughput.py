"""Tokens per second of this project beside a hand-written loop and the plain Trainer, in turns, on one machine.

    python benchmarks/throughput.py --cpu                     the CPU's bars: a 20 M model, a few minutes
    python benchmarks/throughput.py --cpu --variants ours bare --repeats 10
    python benchmarks/throughput.py --cpu --recipes --steps 10           each recipe's architecture, tiny, beside stock
    python benchmarks/throughput.py --models llama_170m:512 llama_170m:2048       one GPU

In: variants (benchmarks/variants.py) and models. Out: one JSON object per line on stdout for each repetition, a table
on stderr. Variants run A B C A B C ...; ratios are medians over repetitions, so that a slow moment hits all alike.
`ours` is compiled where `ours_eager` is not; `bare` likewise; `stock` is transformers' defaults, which compile nothing.
`tokens_per_cpu_s` counts the processor's time of one process: where other programs share the machine, the fairer one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # it is started as a file, too

from benchmarks.interleave import start
from benchmarks.training_data import dataset_of
from benchmarks.variants import Settings
from data_prep.paths import cache_dir

ROOT = Path(__file__).resolve().parent.parent
# Printed name -> the name in benchmarks/variants.py.
NAMES = {
    "ours": "ours_compiled",
    "bare": "bare_compiled",
    "stock": "stock",
    "ours_eager": "ours",
    "bare_eager": "bare",
    "stock_compiled": "stock_compiled",
    "stock_liger": "stock_liger",
    "gpt": "gpt_compiled",
}
CPU_VARIANTS = ("ours", "bare", "stock", "ours_eager", "bare_eager", "stock_compiled")
GPU_VARIANTS = ("ours", "bare", "stock", "stock_compiled", "gpt")
CPU_MODELS = ("llama_20m:512",)
GPU_MODELS = ("llama_170m:512", "llama_170m:2048", "llama_437m:1024", "llama_437m_hd128:1024", "tinyllama_1.1b:2048")
TOKENS_PER_MICRO_BATCH = {True: 1024, False: 65_536}


TINY = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


def tiny_models() -> list[str]:
    """Each recipe's architecture, small, with its block size up to 512, where the loop weighs most."""
    folder = cache_dir() / "benchmarks" / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    models = []
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        named = ROOT / recipe["model"].get("config", "model_configs/llama_demo.json")  # a base model: a Llama
        (folder / f"{path.stem}.json").write_text(json.dumps({**json.loads(named.read_text()), **TINY}))
        models.append(f"{folder / path.stem}.json:{min(512, recipe['data']['block_size'])}")
    return models


def measure(model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All repetitions of one model, in the order in which they ran."""
    named, _, length = model.rpartition(":")
    config = named if named.endswith(".json") else str(ROOT / "model_configs" / f"{named}.json")
    name, block_size = Path(config).stem, int(length)
    vocab_size = json.loads(Path(config).read_text())["vocab_size"]
    rows = max(1, (arguments.tokens or TOKENS_PER_MICRO_BATCH[arguments.cpu]) // block_size)
    settings = {
        shown: Settings(
            variant=NAMES[shown],
            config=config,
            dataset=str(dataset_of(vocab_size, block_size)),
            block_size=block_size,
            rows=rows,
            accumulation=arguments.accumulation,
            num_steps=arguments.warm_up + arguments.steps * arguments.repeats + 1,
            bf16=not arguments.cpu,
            use_cpu=arguments.cpu,
        )
        for shown in arguments.variants
    }
    records, tokens = [], rows * block_size * arguments.accumulation * arguments.steps
    with start(list(settings.values()), arguments.warm_up) as variants:
        for repeat in range(arguments.repeats):
            for shown, variant in zip(settings, variants, strict=True):
                answer = variant.make_steps(arguments.steps)
                record = {
                    "variant": shown,
                    "model": name,
                    "block_size": block_size,
                    "rows": rows,
                    "accumulation": arguments.accumulation,
                    "repeat": repeat,
                    "tokens_per_s": round(tokens / answer["time_s"], 1),
                    "tokens_per_cpu_s": round(tokens / answer["cpu_s"], 1),
                    "warm_up_s": round(variant.warm_up_s, 1),
                    "peak_bytes": answer["peak_bytes"],
                }
                records.append(record)
                print(json.dumps(record), flush=True)
    return records


def tabulate(records: list[dict[str, Any]], baselines: tuple[str, ...] = ("bare", "stock")) -> str:
    """Medians, and medians of the ratios within each repetition."""
    lines = ["model  T  variant  tokens/s  per CPU second  " + "  ".join(f"/ {b} (clock, CPU)" for b in baselines)]
    for model in dict.fromkeys((r["model"], r["block_size"]) for r in records):
        mine = [r for r in records if (r["model"], r["block_size"]) == model]
        by_variant = {
            name: [r for r in mine if r["variant"] == name] for name in dict.fromkeys(r["variant"] for r in mine)
        }
        for name, runs in by_variant.items():
            cells = [f"{model[0]}  {model[1]}  {name:<14}"]
            cells += [
                f"{statistics.median(r[key] for r in runs):>9,.0f}" for key in ("tokens_per_s", "tokens_per_cpu_s")
            ]
            for baseline in baselines:
                if baseline in by_variant:
                    cells.append("  ".join(f"{ratio(runs, by_variant[baseline], key):.3f}" for key in KEYS))
            lines.append("  ".join(cells))
    return "\n".join(lines)


KEYS = ("tokens_per_s", "tokens_per_cpu_s")


def ratio(runs: list[dict[str, Any]], others: list[dict[str, Any]], key: str) -> float:
    """The median over repetitions of one variant's speed over another's."""
    return statistics.median(a[key] / b[key] for a, b in zip(runs, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="fp32 on the CPU, the 20 M model")
    parser.add_argument("--recipes", action="store_true", help="each recipe's architecture, tiny, beside stock")
    parser.add_argument("--models", nargs="+", metavar="CONFIG:T", help="of model_configs/, with the block size")
    parser.add_argument("--variants", nargs="+", choices=list(NAMES))
    parser.add_argument("--tokens", type=int, help="of a micro-batch (1,024 on a CPU, 65,536 on a GPU)")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="of a repetition")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the first repetition")
    arguments = parser.parse_args()
    arguments.models = arguments.models or (CPU_MODELS if arguments.cpu else GPU_MODELS)
    arguments.variants = arguments.variants or (CPU_VARIANTS if arguments.cpu else GPU_VARIANTS)
    if arguments.recipes:
        arguments.models, arguments.variants = tiny_models(), ("ours_eager", "stock")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if arguments.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    records = [record for model in arguments.models for record in measure(model, arguments)]
    print(tabulate(records), file=sys.stderr)


if __name__ == "__main__":
    main()
