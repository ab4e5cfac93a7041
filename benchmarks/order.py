"""What does it cost to ask which block a sample is? Ten million samples, by size of the corpus and of the mixture.

python benchmarks/order.py             prints JSON lines and a table
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clm.order import Order, OrderSource, OrderStage

NUM_SAMPLES = 10_000_000
CASES = {
    "1 dataset of 10^3 blocks": [(10**3, 1)],
    "1 dataset of 10^6 blocks": [(10**6, 1)],
    "1 dataset of 10^12 blocks": [(10**12, 1)],
    "3 datasets, shares 0.7, 0.2, 0.1": [(10**9, 7), (10**8, 2), (10**7, 1)],
}


def main() -> None:
    """Measure each case three times, interleaved; one core."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(3):
        for name, sources in CASES.items():
            total = sum(weight for _, weight in sources)
            shares = tuple(Fraction(weight, total) for _, weight in sources)
            order = Order([OrderSource(n) for n, _ in sources], [OrderStage(None, shares)], seed=1)
            started_at = time.perf_counter()
            for first in range(0, NUM_SAMPLES, 10**6):
                order.block_at(np.arange(first, first + 10**6))
            seconds[name].append(time.perf_counter() - started_at)
            print(json.dumps({"case": name, "num_samples": NUM_SAMPLES, "seconds": seconds[name][-1]}), flush=True)
    print("\n| order | seconds for 10^7 samples, median of 3 |\n|---|---|")
    for name, measured in seconds.items():
        print(f"| {name} | {statistics.median(measured):.2f} |")
    print(f"\npeak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
