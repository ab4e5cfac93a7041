"""What the machine itself can do: the limits that benchmarks are compared with, and how a piece of work is timed.

    python -m benchmarks.hardware cpu | cuda        one JSON line

In: a device. Out: its name, TFLOP/s of a large matrix product, GB/s of a large copy, versions; milliseconds of a call.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

LARGE = {"cuda": 8192, "cpu": 1536}  # rows and columns of the product that is called the limit


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_ms(work: Callable[[], Any], device: torch.device, times: int) -> float:
    """Milliseconds of one call, from `times` of them in a row; on a GPU by its own clock."""
    if device.type != "cuda":
        began_at = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began_at) * 1000 / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def times_for(work: Callable[[], Any], device: torch.device, seconds: float) -> int:
    """How often to call it so that it takes about so long; it has been called before."""
    return max(1, min(1000, round(seconds * 1000 / max(time_ms(work, device, 1), 1e-3))))


def describe(device: torch.device) -> dict[str, Any]:
    """Name and versions, for the records."""
    threads = torch.get_num_threads()
    found = {
        "device": f"{_processor()}, {threads} {'thread' if threads == 1 else 'threads'}",
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def limits(device: torch.device) -> dict[str, Any]:
    """`describe`, and the two limits in the precision that models are trained in there."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    measured = {"matmul_tflops": round(matmul_tflops(device, dtype), 3)}
    return {**describe(device), **measured, "copy_gb_per_s": round(copy_gb_per_s(device), 1)}


def matmul_tflops(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """The best rate of a square product that is large for this device: the limit of a model's products."""
    size = LARGE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> torch.Tensor:
        return a @ b

    multiply()
    times = times_for(multiply, device, 0.2)
    return 2 * size**3 / min(time_ms(multiply, device, times) for _ in range(repeats)) / 1e9


def copy_gb_per_s(device: torch.device, repeats: int = 5) -> float:
    """Bytes read and written by a large copy: the limit of everything that is no matrix product."""
    source = torch.empty(2**29 if device.type == "cuda" else 2**25, device=device, dtype=torch.float32).normal_()
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    times = times_for(copy, device, 0.2)
    return 2 * 4 * source.numel() / min(time_ms(copy, device, times) for _ in range(repeats)) / 1e6


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    print(json.dumps(limits(torch.device(sys.argv[1]))))
