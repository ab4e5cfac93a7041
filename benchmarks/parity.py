"""Are the losses of our steps those of the plain Trainer? Both train the same weights on the same batches.

    python benchmarks/parity.py                     500 steps of the demo's model in fp32 on the CPU
    python benchmarks/parity.py --steps 50 --variants ours ours_compiled

In: variants of benchmarks/variants.py. Out: one JSON line per variant on stdout, the largest relative difference of a
step's loss from the plain Trainer's; exit code 1 where it is larger than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # it is started as a file, too

from benchmarks.interleave import start
from benchmarks.training_data import dataset_of
from benchmarks.variants import Settings

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "model_configs" / "llama_demo.json"))
    parser.add_argument("--variants", nargs="+", default=["ours", "ours_stock"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    arguments = parser.parse_args()
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
            logs_losses=True,
        )
        for variant in ("parity", *arguments.variants)
    ]
    with start(settings, 1) as variants:
        curves = [variant.first["losses"] + variant.make_steps(arguments.steps - 1)["losses"] for variant in variants]
    worst = 0.0
    for variant, curve in zip(arguments.variants, curves[1:], strict=True):
        differences = [abs(a - b) / abs(b) for a, b in zip(curve, curves[0], strict=True)]
        record = {
            "variant": variant,
            "steps": len(differences),
            "largest_difference": max(differences),
            "at_step": differences.index(max(differences)) + 1,
            "first_loss": curve[0],
            "last_loss": curve[-1],
        }
        worst = max(worst, *differences)
        print(json.dumps(record), flush=True)
    return int(not worst <= arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())
