"""Are the losses of our steps those of the plain Trainer? Both train the same weights on the same batches.

    python benchmarks/parity.py                     500 steps of the demo's model in fp32 on the CPU
    python benchmarks/parity.py --steps 50 --variants ours ours_compiled
    python benchmarks/parity.py --bf16 --variants ours ours_residual    autocast, and the residual stream in bf16 too

In: variants of benchmarks/variants.py. Out: one JSON line per variant on stdout: the largest relative difference of a
step's loss from the plain Trainer's, and that of the mean loss of the last 50 steps, in which roundings cancel; exit
code 1 where the largest one is above --tolerance.
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
LAST = 50  # steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "model_configs" / "llama_demo.json"))
    parser.add_argument("--variants", nargs="+", default=["ours", "ours_stock"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="autocast in all of them, the plain Trainer too")
    parser.add_argument("--tolerance", type=float, help="default: 1e-5, with --bf16 0.02")
    arguments = parser.parse_args()
    tolerance = arguments.tolerance or (0.02 if arguments.bf16 else 1e-5)
    os.environ.update(TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
    vocab_size = json.loads(Path(arguments.config).read_text())["vocab_size"]
    settings = [
        Settings(
            variant=variant,
            config=arguments.config,
            dataset=str(dataset_of(vocab_size, arguments.block_size)),
            block_size=arguments.block_size,
            rows=arguments.rows,
            accumulation=arguments.accumulation,
            num_steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            bf16=arguments.bf16,
            logs_losses=True,
        )
        for variant in ("parity", *arguments.variants)
    ]
    with start(settings, 1) as variants:
        curves = [variant.first["losses"] + variant.make_steps(arguments.steps - 1)["losses"] for variant in variants]
    worst, of_stock = 0.0, statistics.mean(curves[0][-LAST:])
    for variant, curve in zip(arguments.variants, curves[1:], strict=True):
        differences = [abs(a - b) / abs(b) for a, b in zip(curve, curves[0], strict=True)]
        record = {
            "variant": variant,
            "steps": len(differences),
            "largest_difference": max(differences),
            "at_step": differences.index(max(differences)) + 1,
            "difference_of_last_mean": abs(statistics.mean(curve[-LAST:]) - of_stock) / of_stock,
            "first_loss": curve[0],
            "last_loss": curve[-1],
        }
        worst = max(worst, *differences)
        print(json.dumps(record), flush=True)
    return int(not worst <= tolerance)


if __name__ == "__main__":
    sys.exit(main())
