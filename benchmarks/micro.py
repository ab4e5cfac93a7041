"""Where does a step go? Each part of it alone, in the variants one can choose from, beside the whole step.

    python benchmarks/micro.py --cpu                                     a small model in fp32, some minutes
    python benchmarks/micro.py --cpu --models llama_demo:256 --parts loss optimizer --seconds 0.05
    python benchmarks/micro.py                                           on a GPU in bf16: the shipped configs
    python benchmarks/micro.py --models llama_170m:2048 --tokens 32768

In: model configs with a block size. Out: a JSON line for each part, variant and repetition on stdout, a table on
stderr. The variants of a part run A B C A B C. Those that a run takes are marked *; their sum, each times its number in
a step, is set beside the measured step, and what is left is "rest": launches, gaps, and what no part has. It is
negative where the step is faster than its parts alone: kernels that were fused, data that was still near. A step is one
micro-batch and one update.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # it is started as a file, too

from benchmarks import hardware, micro_parts, micro_step
from benchmarks.micro_parts import Shape, Way
from benchmarks.training_data import dataset_of
from clm.meter import flops_per_token, peak_flops
from clm.model import load_config

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("gemm", "attention", "loss", "elementwise", "cast", "optimizer", "input")
CPU_MODELS = ("llama_20m:512",)
GPU_MODELS = ("llama_170m:512", "llama_170m:2048", "llama_437m:1024", "llama_437m_hd128:1024", "mixtral_1.6b:1024")
TOKENS = {"cpu": 1024, "cuda": 65_536}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="fp32 on the CPU, a small model")
    parser.add_argument("--models", nargs="+", metavar="CONFIG:T", help="of model_configs/, with the block size")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, help="of the micro-batch (1,024 on a CPU, 65,536 on a GPU)")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each repetition of a variant")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU: add --cpu")
    device = torch.device("cpu" if arguments.cpu else "cuda")
    dtype = torch.float32 if arguments.cpu else torch.bfloat16
    limits = hardware.limits(device)
    print(json.dumps(limits), flush=True)
    is_compiled = (not arguments.cpu) if arguments.compiled is None else arguments.compiled
    for model in arguments.models or (CPU_MODELS if arguments.cpu else GPU_MODELS):
        named, _, length = model.rpartition(":")
        path = named if named.endswith(".json") else str(ROOT / "model_configs" / f"{named}.json")
        rows = max(1, (arguments.tokens or TOKENS[device.type]) // int(length))
        shape = Shape(load_config(path), path, rows, int(length), device, dtype, is_compiled)
        records = measure_model(shape, arguments)
        print(tabulate(shape, records, limits), file=sys.stderr)


def measure_model(shape: Shape, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All parts of one model, and the whole step."""
    records: list[dict[str, Any]] = []
    simple = {"gemm": micro_parts.gemms, "attention": micro_parts.attentions, "loss": micro_parts.losses}
    simple["elementwise"] = micro_parts.elementwise
    for part, make in simple.items():
        if part in arguments.parts:
            records += measure(make(shape), shape, arguments)
    dataset = dataset_of(shape.config.vocab_size, shape.block_size)
    if "input" in arguments.parts:
        records += measure(micro_step.inputs(shape, dataset), shape, arguments)
    model = micro_step.make_model(shape)
    for part, make in (("cast", micro_step.casts), ("optimizer", micro_step.optimizers)):
        if part in arguments.parts:
            records += measure(make(shape, model), shape, arguments)
    model.zero_grad(set_to_none=True)
    records += measure(iter([micro_step.whole_step(shape, model, dataset)]), shape, arguments)
    flops = flops_per_token(model, shape.config, shape.block_size) * shape.num_tokens
    records[-1]["palm_flops"] = flops
    return records


def measure(ways: Iterator[Way], shape: Shape, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The ways of one part in turns; what cannot be done here is recorded with the reason."""
    found: list[tuple[Way, int]] = []
    records: list[dict[str, Any]] = []

    def note(way: Way, **more: Any) -> None:
        about = {"model": Path(shape.path).stem, "block_size": shape.block_size, "rows": shape.rows}
        about |= {"part": way.part, "variant": way.variant, "count": way.count, "is_used": way.is_used}
        records.append({**about, **more})
        print(json.dumps(records[-1]), flush=True)

    for way in ways:
        why_not = way.why_not
        if way.run is not None:
            try:
                for _ in range(2):  # compile, and take memory
                    way.run()
                found.append((way, hardware.times_for(way.run, shape.device, arguments.seconds)))
            except RuntimeError as error:  # out of memory, or no kernel for this shape
                why_not = str(error).strip().splitlines()[0][:200]
        if why_not is not None:
            note(way, skipped=why_not)
    for repeat in range(arguments.repeats):
        for way, times in found:
            ms = hardware.time_ms(way.run, shape.device, times)
            tflops = {} if way.flops is None else {"tflops": round(way.flops / ms / 1e9, 3)}
            note(way, repeat=repeat, ms=round(ms, 5), **tflops)
    found.clear()
    gc.collect()
    if shape.device.type == "cuda":
        torch.cuda.empty_cache()
    return records


def tabulate(shape: Shape, records: list[dict[str, Any]], limits: dict[str, Any]) -> str:
    """Medians of each way; the used ones' sum beside the whole step."""
    by_way: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        by_way.setdefault((record["part"], record["variant"]), []).append(record)
    whole = statistics.median(r["ms"] for r in by_way["step", "whole"])
    lines = [
        f"\n{Path(shape.path).stem}, {shape.rows} rows of {shape.block_size}, {'' if shape.is_compiled else 'not '}"
        f"compiled; {limits['device']}, torch {limits['torch']}: {limits['matmul_tflops']:,.2f} TFLOP/s in a large "
        f"matrix product, {limits['copy_gb_per_s']:,.0f} GB/s in a large copy",
        f"  {'part':<12} {'variant':<38} {'ms':>10} {'x':>4} {'ms a step':>10} {'of step':>8} {'TFLOP/s':>9}  of limit",
    ]
    total = 0.0
    for (part, variant), runs in by_way.items():
        if part == "step":
            continue
        if "skipped" in runs[0]:
            lines.append(f"  {part:<12} {variant:<38} {'-':>10}  {runs[0]['skipped']}")
            continue
        ms, count = statistics.median(r["ms"] for r in runs), runs[0]["count"]
        line = (
            f"{'*' if runs[0]['is_used'] else ' '} {part:<12} {variant:<38} {ms:>10.3f} {count:>4} {ms * count:>10.2f}"
        )
        line += f" {ms * count / whole:>8.1%}"
        if "tflops" in runs[0]:
            tflops = statistics.median(r["tflops"] for r in runs)
            line += f" {tflops:>9.2f}  {tflops / limits['matmul_tflops']:.0%}"
        total += ms * count if runs[0]["is_used"] else 0.0
        lines.append(line)
    are_all = set(PARTS) - {"cast"} <= {part for part, _ in by_way}
    for name, ms in (
        ("sum of *" if are_all else "sum of *, some parts left out", total),
        ("rest", whole - total),
        ("whole step", whole),
    ):
        lines.append(f"  {name:<51} {'':>10} {'':>4} {ms:>10.2f} {ms / whole:>8.1%}")
    rate = records[-1]["palm_flops"] / whole / 1e9
    lines[-1] += f" {rate:>9.2f}  {rate / limits['matmul_tflops']:.0%}, {shape.num_tokens / whole * 1000:,.0f} tokens/s"
    peak = peak_flops(limits["device"], None) if shape.device.type == "cuda" else None
    if peak:
        lines[-1] += f", MFU {rate * 1e12 / peak:.1%}"
    return "\n".join(lines)


if __name__ == "__main__":
    main()
