"""How many GPUs are worth it? Memory, traffic and efficiency of our models on 1 to 1,024 GPUs, from formulas.

    python benchmarks/scale.py                   prints the tables of docs/scale.md and draws docs/images/scale.svg
    python benchmarks/scale.py --nic 25 --mfu 0.45

Nothing here is measured. The assumptions are the options' defaults; the last table compares the formulas with published
measurements, to which nothing was fitted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COUNTS = [2**k for k in range(11)]
PER_NODE = 8


@dataclass(frozen=True)
class Cluster:
    """What is assumed; bandwidths in GB/s per GPU and direction, as a collective reaches them."""

    peak: float = 989e12  # FLOP/s of an H100 in bf16, dense
    mfu: float = 0.40  # on one GPU
    nvlink: float = 350.0  # of 450
    nic: float = 40.0  # of 50: one 400 Gb/s port per GPU
    latency_s: float = 15e-6  # of one hop of a tree between nodes
    jitter: float = 0.01  # standard deviation of a GPU's step time; a step takes as long as the slowest


@dataclass(frozen=True)
class Model:
    """A model and its global batch."""

    name: str
    num_parameters: float
    num_layers: int
    tokens_per_step: int
    rows_tokens: int  # of the largest micro-batch of one GPU


def traffic(model: Model, how: str, num_gpus: int, accumulation: int) -> dict[str, float]:
    """Bytes that one GPU sends in one step, by link: "nvlink" or "nic".

    An all-reduce of S bytes sends 2 S (P-1)/P, an all-gather or reduce-scatter S (P-1)/P (ring algorithm; Thakur et al.
    2005, section 4). Weights travel in bf16, gradients in fp32, as clm trains.
    """
    n, p = model.num_parameters, num_gpus
    if p == 1:
        return {"nvlink": 0.0, "nic": 0.0}
    link = "nvlink" if p <= PER_NODE else "nic"
    part = (p - 1) / p
    if how == "DDP":
        return {"nvlink": 0.0, "nic": 0.0, link: 2 * 4 * n * part}
    if how == "FSDP2":  # gathered in each forward and backward; gradients once a step
        return {"nvlink": 0.0, "nic": 0.0, link: (accumulation * 2 * 2 * n + 4 * n) * part}
    inside, copies = min(p, PER_NODE), max(1, p // PER_NODE)  # HSDP: a copy per node
    within = (accumulation * 2 * 2 * n + 4 * n) * (inside - 1) / inside
    return {"nvlink": within, "nic": 2 * 4 * n / inside * (copies - 1) / copies}


def step_time(model: Model, how: str, num_gpus: int, cluster: Cluster) -> float | None:
    """Seconds of one step; None where there are more GPUs than rows.

    Compute 6 N tokens / (peak x MFU) (Kaplan et al. 2020, section 2.1). DDP's all-reduce hides behind the last
    backward, two thirds of a micro-batch's time; FSDP's collectives behind all of the computing.
    """
    tokens = model.tokens_per_step / num_gpus
    if tokens < 1024:
        return None
    accumulation = max(1, math.ceil(tokens / model.rows_tokens))
    compute = 6 * model.num_parameters * tokens / (cluster.peak * cluster.mfu)
    sent = traffic(model, how, num_gpus, accumulation)
    seconds = sent["nvlink"] / (cluster.nvlink * 1e9) + sent["nic"] / (cluster.nic * 1e9)
    num_nodes = max(1, num_gpus // PER_NODE)
    calls = 1 + model.num_layers * (1 if how == "DDP" else 2 * accumulation + 1)
    latency = calls * 2 * math.log2(num_nodes) * cluster.latency_s if num_nodes > 1 else 0.0
    hidden = compute / accumulation * 2 / 3 if how == "DDP" else compute
    slowest = 1 + cluster.jitter * math.sqrt(2 * math.log(num_gpus)) if num_gpus > 1 else 1.0
    return compute * slowest + max(0.0, seconds + latency - hidden)


def efficiency(model: Model, how: str, num_gpus: int, cluster: Cluster) -> float | None:
    """Tokens per second and GPU, as a share of one GPU's."""
    seconds, alone = step_time(model, how, num_gpus, cluster), step_time(model, how, 1, cluster)
    return None if seconds is None or alone is None else alone / num_gpus / seconds


def load_models() -> list[Model]:
    """Ours, with global batches of 0.5 to 4 M tokens."""
    sys.path[0] = str(ROOT)  # not benchmarks/, where data_prep is a file
    from clm.model import count_parameters, load_config

    found = []
    for name, tokens_per_step, rows_tokens in (
        ("llama_170m", 2**19, 2**16),
        ("llama_437m", 2**19, 2**15),
        ("tinyllama_1.1b", 2**21, 2**14),
        ("llama2_7b", 2**22, 2**14),
    ):
        path = ROOT / "model_configs" / f"{name}.json"
        layers = json.loads(path.read_text())["num_hidden_layers"]
        found.append(Model(name, count_parameters(load_config(str(path))), layers, tokens_per_step, rows_tokens))
    return found


def memory_table(models: list[Model]) -> list[str]:
    """GB per GPU of weights, gradients and AdamW, without activations."""
    lines = ["| model | parameters | one GPU, DDP (16 N) | FSDP2 on 8 (16 N/8) | on 64 | ZeRO 1 on 8 | ZeRO 2 on 8 |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for model in models:
        n = model.num_parameters / 1e9
        cells = [16 * n, 16 * n / 8, 16 * n / 64, 4 * n + 12 * n / 8, 2 * n + 14 * n / 8]
        lines.append(f"| {model.name} | {n:.3f} x 10^9 | " + " | ".join(f"{c:.2f}" for c in cells) + " |")
    return lines


def efficiency_table(models: list[Model], cluster: Cluster) -> list[str]:
    """Per cent of one GPU's speed, at the model's own global batch."""
    shown = [8, 16, 64, 256, 1024]
    lines = ["| model, tokens per step | how | " + " | ".join(f"{p:,} GPUs" for p in shown) + " |"]
    lines.append("|---|---|" + "---|" * len(shown))
    for model in models:
        for how in ("DDP", "FSDP2", "HSDP"):
            values = [efficiency(model, how, p, cluster) for p in shown]
            cells = ["-" if v is None else f"{100 * v:.0f} %" for v in values]
            lines.append(f"| {model.name}, {model.tokens_per_step:,} | {how} | " + " | ".join(cells) + " |")
    return lines


def comparison(cluster: Cluster) -> list[str]:
    """FSDP2 of Llama 3.1 8B on 8 and 128 H100, 16,384 tokens per GPU and step.

    Source: pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3.
    """
    lines = [
        "| Llama 3.1 8B, tokens/s per GPU | on 8 | on 128 | measured ratio | by the formula |",
        "|---|---|---|---|---|",
    ]
    for name, on_8, on_128 in (("FSDP", 5762, 5605), ("FSDP + torch.compile", 6667, 6514)):
        speed = 6 * 8.03e9 * on_8 / cluster.peak  # the MFU that one GPU must have had
        times = []
        for p in (8, 128):
            model = Model("8b", 8.03e9, 32, 16384 * p, 16384)
            times.append(step_time(model, "FSDP2", p, replace(cluster, mfu=speed)))
        lines.append(f"| {name} | {on_8:,} | {on_128:,} | {on_128 / on_8:.3f} | {times[0] / times[1]:.3f} |")
    return lines


def draw(models: list[Model], cluster: Cluster, path: Path) -> None:
    """Efficiency over GPUs, one panel per model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), sharey=True), models, strict=True):
        for how, color in (("DDP", "#0969da"), ("FSDP2", "#cf222e"), ("HSDP", "#1a7f37")):
            points = [(p, efficiency(model, how, p, cluster)) for p in COUNTS]
            points = [(p, 100 * e) for p, e in points if e is not None]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, label=how)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
        axes.set_title(f"{model.name}\n{model.tokens_per_step / 2**20:g} M tokens per step", fontsize=9)
        axes.set_xlabel("GPUs")
        axes.set_ylim(0, 105)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("% of one GPU's speed")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Cluster()).items():
        parser.add_argument(f"--{name.removesuffix('_s')}", dest=name, type=float, default=value)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "scale.svg")
    options = vars(parser.parse_args())
    path = options.pop("out")
    cluster, models = Cluster(**options), load_models()
    for table in (memory_table(models), efficiency_table(models, cluster), comparison(cluster)):
        print("\n".join(table), end="\n\n")
    draw(models, cluster, path)


if __name__ == "__main__":
    main()
