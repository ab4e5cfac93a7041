"""What the loop itself costs: a model of one parameter and a free forward, so that nothing else is left.

    python benchmarks/loop_overhead.py

In: ours, a bare loop, the plain Trainer. Out: one JSON line per variant and repetition, and a table: milliseconds of
CPU time per micro-step and per step (one optimizer step, the callbacks, the meter), and what is above bare. Steps of 1
and of 9 micro-batches are timed: their difference is 8 micro-steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # it is started as a file, too

from benchmarks.interleave import start
from benchmarks.training_data import dataset_of
from benchmarks.variants import Settings

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("ours", "bare", "stock")
FEW, MANY = 1, 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of a repetition")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=512)
    arguments = parser.parse_args()
    os.environ.update(TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
    config = ROOT / "model_configs" / "llama_demo.json"
    vocab_size = json.loads(config.read_text())["vocab_size"]
    settings = [
        Settings(
            variant=variant,
            config=str(config),
            dataset=str(dataset_of(vocab_size, arguments.block_size)),
            block_size=arguments.block_size,
            rows=arguments.rows,
            accumulation=accumulation,
            num_steps=5 + arguments.steps * arguments.repeats + 1,
            is_null=True,
        )
        for variant in VARIANTS
        for accumulation in (FEW, MANY)
    ]
    costs: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    with start(settings, 5) as variants:
        for repeat in range(arguments.repeats):
            ms = [1000 * each.make_steps(arguments.steps)["cpu_s"] / arguments.steps for each in variants]
            for variant, few, many in zip(VARIANTS, ms[::2], ms[1::2], strict=True):
                per_micro_step = (many - few) / (MANY - FEW)
                per_step = few - per_micro_step * FEW
                costs[variant].append((per_micro_step, per_step))
                record = {"variant": variant, "repeat": repeat, "ms_per_micro_step": per_micro_step}
                print(json.dumps({**record, "ms_per_step": per_step}), flush=True)
    medians = {v: [statistics.median(pair[i] for pair in costs[v]) for i in (0, 1)] for v in VARIANTS}
    print("variant  ms per micro-step (above bare)  ms per step (above bare)", file=sys.stderr)
    for variant, (micro, step) in medians.items():
        above = [value - medians["bare"][i] for i, value in enumerate((micro, step))]
        print(f"{variant:<8} {micro:>6.2f} ({above[0]:+.2f})   {step:>6.2f} ({above[1]:+.2f})", file=sys.stderr)


if __name__ == "__main__":
    main()
