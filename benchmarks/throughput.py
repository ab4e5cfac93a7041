"""Tokens per second of this project beside a hand-written loop and the plain Trainer, in turns, on one machine.

    python benchmarks/throughput.py --cpu                     the CPU's bars: a 20 M model, a few minutes
    python benchmarks/throughput.py --cpu --variants ours bare --repeats 10
    python benchmarks/throughput.py --cpu --recipes --steps 10           each recipe's architecture, tiny, beside stock
    python benchmarks/throughput.py --cpu --evaluation                   ours before and after its first evaluation
    python benchmarks/throughput.py --models llama_170m:512 llama_170m:2048 llama_170m:1024:8192        one GPU

In: variants (benchmarks/variants.py) and models. Out: one JSON object per line on stdout for each repetition, a table
on stderr. Variants run A B C A B C ...; ratios are medians over repetitions, so that a slow moment hits all alike.
`ours` is compiled where `ours_eager` is not; `bare` likewise; `stock` is transformers' defaults, which compile nothing,
and `stock_best` the same with the micro-batch that it is fastest with, at as many tokens per step.
`tokens_per_cpu_s` counts the processor's time of one process: where other programs share the machine, the fairer one.

Of each variant also: seconds to compile (its first steps less as many later ones), peak memory, waits for the device
per step between log points, kernels of attention; MFU of the device's dense bf16 peak by PaLM's formula (docs/speed.md)
and the same FLOPs as a share of what a large matrix product reaches here. What is not installed, or does not fit, is a
line with the reason. All variants live at the same time; where that is too much for a GPU: --separate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # it is started as a file, too

from benchmarks.interleave import Variant, start
from benchmarks.training_data import dataset_of
from benchmarks.turns import EXAMINED
from benchmarks.variants import LOGGING_STEPS, Settings, flops_of
from clm.meter import peak_flops
from data_prep.paths import cache_dir

ROOT = Path(__file__).resolve().parent.parent
# Printed name -> the name in benchmarks/variants.py.
NAMES = {
    "ours": "ours_compiled",
    "bare": "bare_compiled",
    "stock": "stock",
    "stock_best": "stock",
    "ours_eager": "ours",
    "bare_eager": "bare",
    "stock_compiled": "stock_compiled",
    "stock_liger": "stock_liger",
    "gpt": "gpt_compiled",
    "litgpt": "litgpt_compiled",
}
# Imported before a variant that needs them is started.
NEEDED = {"stock_liger": "import liger_kernel.transformers", "litgpt": "from litgpt import GPT, Config"}
CPU_VARIANTS = ("ours", "bare", "stock", "ours_eager", "bare_eager", "stock_compiled")
GPU_VARIANTS = ("ours", "bare", "stock", "stock_best", "stock_compiled", "stock_liger", "gpt", "litgpt")
CPU_MODELS = ("llama_20m:512",)
GPU_MODELS = ("llama_170m:512", "llama_170m:2048", "llama_437m:1024", "llama_437m_hd128:1024", "llama_170m:1024:8192")
GPU_MODELS += ("mixtral_1.6b:1024:32768", "tinyllama_1.1b:2048:32768")
TOKENS_PER_MICRO_BATCH = {True: 1024, False: 65_536}
RATES = {"tokens_per_s": "time_s", "tokens_per_cpu_s": "cpu_s"}  # by which of what a process answers
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


def read_model(model: str, arguments: argparse.Namespace) -> tuple[str, int, int]:
    """CONFIG:T or CONFIG:T:TOKENS -> config file, T, rows of a micro-batch."""
    named, *numbers = model.rsplit(":", model.count(":"))
    config = named if named.endswith(".json") else str(ROOT / "model_configs" / f"{named}.json")
    default = arguments.tokens or TOKENS_PER_MICRO_BATCH[arguments.cpu]
    block_size, tokens = int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else default
    return config, block_size, max(1, tokens // block_size)


def settings_of(shown: str, model: str, arguments: argparse.Namespace, cut: int = 1) -> Settings:
    """What a variant needs to know; `cut` is the number of parts into which a step's rows are cut instead."""
    config, block_size, rows = read_model(model, arguments)
    accumulation = arguments.accumulation
    if shown == "stock_best":
        rows, accumulation = rows * accumulation // cut, cut
    vocab_size = json.loads(Path(config).read_text())["vocab_size"]
    return Settings(
        variant=NAMES[shown],
        config=config,
        dataset=str(dataset_of(vocab_size, block_size, arguments.evaluation)),
        block_size=block_size,
        rows=rows,
        accumulation=accumulation,
        # of a repetition one more, which is not timed
        num_steps=arguments.warm_up
        + LOGGING_STEPS
        + max(EXAMINED.values())
        + (arguments.steps + 1) * (arguments.repeats + 1),
        bf16=not arguments.cpu,
        use_cpu=arguments.cpu,
        evaluates=arguments.evaluation,
    )


def find_best_cut(model: str, arguments: argparse.Namespace) -> int:
    """Into how many micro-batches the plain Trainer cuts a step best: halves of halves, until two in a row are slower.

    Raises:
        RuntimeError: none of them fits.
    """
    _, _, rows = read_model(model, arguments)
    seconds: dict[int, float] = {}
    why, cut = "", 1
    while rows * arguments.accumulation % cut == 0 and cut <= 4 * min(seconds, key=seconds.get, default=cut):
        try:
            settings = settings_of("stock_best", model, arguments, cut)
            with start([settings], arguments.warm_up) as (variant,):
                seconds[cut] = min(variant.make_steps(arguments.steps)["time_s"] for _ in range(2))
            tokens = settings.rows * settings.block_size
            print(f"stock by {tokens:,} tokens: {seconds[cut]:.3f} s for {arguments.steps} steps", file=sys.stderr)
        except RuntimeError as error:  # it has ended; memory, as a rule
            why = str(error)
        cut *= 2
    if not seconds:
        raise RuntimeError(why)
    return min(seconds, key=seconds.get)


def measure(model: str, limits: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All repetitions of one model, in the order in which they ran."""
    config, block_size, rows = read_model(model, arguments)
    about = {"model": Path(config).stem, "block_size": block_size, "rows": rows, "accumulation": arguments.accumulation}
    peak = None if arguments.cpu else peak_flops(limits["device"], None)
    tokens, records = rows * block_size * arguments.accumulation * arguments.steps, []
    left_out = {shown: why for shown in arguments.variants if (why := why_not(shown)) is not None}
    cuts: dict[str, int] = {}
    examined: dict[str, dict[str, Any]] = {}
    flops: dict[str, int] = {}

    def note(record: dict[str, Any]) -> None:
        records.append(record)
        print(json.dumps(record), flush=True)

    def begin(shown: str, stack: ExitStack) -> Variant | None:
        """The variant after its warm-up; None, and noted as left out, where it cannot be."""
        try:
            if shown == "stock_best" and shown not in cuts:
                cuts[shown] = find_best_cut(model, arguments)
            settings = settings_of(shown, model, arguments, cuts.get(shown, 1))
            variant = stack.enter_context(start([settings], arguments.warm_up))[0]
            examined_steps = EXAMINED[variant.settings.device.type]
            if arguments.warm_up % LOGGING_STEPS + examined_steps >= LOGGING_STEPS:  # past the next log point
                variant.make_steps(LOGGING_STEPS - arguments.warm_up % LOGGING_STEPS)
            answer = variant.make_steps(examined_steps, "examine")
            examined[shown] = {k: v for k, v in answer.items() if k in ("syncs_per_step", "attention_kernels")}
            flops.setdefault(shown, flops_of(variant.settings))
            return variant
        except RuntimeError as error:  # it has ended; memory, as a rule
            left_out[shown] = str(error).strip().splitlines()[-1][:200]
            return None

    def repeat_once(shown: str, variant: Variant, repeat: int) -> None:
        if not arguments.cpu:
            variant.make_steps(1)  # takes the memory back that others had meanwhile
        answer = variant.make_steps(arguments.steps)
        rate = tokens / answer["time_s"]
        flops_per_s = rate * flops[shown]
        compile_s = variant.first["time_s"] - arguments.warm_up * answer["time_s"] / arguments.steps
        more = {"mfu": round(flops_per_s / peak, 4)} if peak else {}
        note(
            {
                "variant": shown,
                **about,
                "rows": variant.settings.rows,
                "accumulation": variant.settings.accumulation,
                "repeat": repeat,
                **rates_of(tokens, answer),
                **more,
                "share_of_matmul_limit": round(flops_per_s / limits["matmul_tflops"] / 1e12, 4),
                "warm_up_s": round(variant.warm_up_s, 1),
                "compile_s": round(max(0.0, compile_s), 1),
                "peak_bytes": answer["peak_bytes"],
                **examined[shown],
            }
        )

    wanted = [shown for shown in arguments.variants if shown not in left_out]
    with ExitStack() as together:
        living = {} if arguments.separate else {shown: begin(shown, together) for shown in wanted}
        for repeat in range(arguments.repeats):
            for shown in (each for each in wanted if each not in left_out):
                with ExitStack() as alone:
                    variant = begin(shown, alone) if arguments.separate else living[shown]
                    try:
                        if variant is not None:
                            repeat_once(shown, variant, repeat)
                    except RuntimeError as error:
                        left_out[shown] = str(error).strip().splitlines()[-1][:200]
    for shown, why in left_out.items():
        note({"variant": shown, **about, "skipped": why})
    return records


def measure_evaluation(model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Ours before and after its first evaluation, in turns with a process that does not evaluate."""
    config, block_size, rows = read_model(model, arguments)
    tokens, records = rows * block_size * arguments.accumulation * arguments.steps, []
    shown = [each for each in arguments.variants if each.startswith("ours")][:1] or ["ours"]
    settings = settings_of(shown[0], model, arguments)
    settings.num_steps += (arguments.steps + 1) * arguments.repeats
    with start([settings, settings], arguments.warm_up) as (evaluating, control):
        for when in ("before", "after"):
            for repeat in range(arguments.repeats):
                for name, variant in (("evaluating", evaluating), ("control", control)):
                    variant.make_steps(1, "evaluate" if (name, when, repeat) == ("evaluating", "after", 0) else "")
                    took = variant.make_steps(arguments.steps)
                    about = {"variant": shown[0], "model": Path(config).stem, "block_size": block_size}
                    about |= {"process": name, "when": when, "repeat": repeat}
                    records.append({**about, **rates_of(tokens, took)})
                    print(json.dumps(records[-1]), flush=True)
    ratios = {key: _change_by_pairs(records, key) for key in RATES}
    print(
        f"{Path(config).stem} {block_size}  speed after / before its first evaluation, beside a process that does not "
        f"evaluate, medians of {arguments.repeats} pairs: {ratios['tokens_per_s']:.3f} by the clock, "
        f"{ratios['tokens_per_cpu_s']:.3f} by CPU time",
        file=sys.stderr,
    )
    return records


def rates_of(tokens: int, answer: dict[str, Any]) -> dict[str, float]:
    """By the clock and by the processor's time."""
    return {key: round(tokens / answer[seconds], 1) for key, seconds in RATES.items()}


def _change_by_pairs(records: list[dict[str, Any]], key: str) -> float:
    """Of evaluating / control, two turns that follow each other: the median after the evaluation / before it."""

    def beside_control(when: str) -> float:
        turns = (
            [r for r in records if (r["process"], r["when"]) == (name, when)] for name in ("evaluating", "control")
        )
        return ratio(*turns, key)

    return beside_control("after") / beside_control("before")


def why_not(shown: str) -> str | None:
    """Why a variant cannot be started here, or None."""
    if shown not in NEEDED:
        return None
    done = subprocess.run([sys.executable, "-c", NEEDED[shown]], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it cannot be imported"])[-1]


def tabulate(records: list[dict[str, Any]], baselines: tuple[str, ...] = ("bare", "stock")) -> str:
    """Medians, and medians of the ratios within each repetition."""
    heads = "  ".join(f"/ {b} (clock, CPU)" for b in baselines)
    lines = [f"model  T  variant  tokens/s  per CPU second  {heads}  MFU, of limit  compile s  peak GB  syncs/step"]
    for model in dict.fromkeys((r["model"], r["block_size"], r["rows"]) for r in records):
        mine = [r for r in records if (r["model"], r["block_size"], r["rows"]) == model]
        by_variant = {
            name: [r for r in mine if r["variant"] == name] for name in dict.fromkeys(r["variant"] for r in mine)
        }
        for name, runs in by_variant.items():
            cells = [f"{model[0]}  {model[1]}  {name:<14}"]
            if "skipped" in runs[-1]:
                lines.append(f"{cells[0]}  left out: {runs[-1]['skipped']}")
                continue
            cells += [f"{statistics.median(r[key] for r in runs):>9,.0f}" for key in RATES]
            for baseline in baselines:
                if baseline in by_variant and "skipped" not in by_variant[baseline][-1]:
                    cells.append("  ".join(f"{ratio(runs, by_variant[baseline], key):.3f}" for key in RATES))
            if "mfu" in runs[0]:
                cells.append(f"{statistics.median(r['mfu'] for r in runs):.1%}")
            cells.append(f"{statistics.median(r['share_of_matmul_limit'] for r in runs):.1%}")
            cells.append(f"{runs[0]['compile_s']:>6.1f}")
            cells.append(f"{max(r['peak_bytes'] for r in runs) / 1e9:>6.1f}" if runs[0]["peak_bytes"] else "     -")
            cells.append(f"{runs[0]['syncs_per_step']:g}" if "syncs_per_step" in runs[0] else "-")
            lines.append("  ".join(cells))
            lines += [f"      {kernel}" for kernel in runs[0]["attention_kernels"]]
    return "\n".join(lines)


def ratio(runs: list[dict[str, Any]], others: list[dict[str, Any]], key: str) -> float:
    """The median over repetitions of one variant's speed over another's."""
    return statistics.median(a[key] / b[key] for a, b in zip(runs, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="fp32 on the CPU, the 20 M model")
    parser.add_argument("--recipes", action="store_true", help="each recipe's architecture, tiny, beside stock")
    parser.add_argument("--evaluation", action="store_true", help="ours before and after its first evaluation")
    parser.add_argument(
        "--models", nargs="+", metavar="CONFIG:T[:TOKENS]", help="of model_configs/, block size, tokens"
    )
    parser.add_argument("--variants", nargs="+", choices=list(NAMES))
    parser.add_argument("--tokens", type=int, help="of a micro-batch (1,024 on a CPU, 65,536 on a GPU)")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="of a repetition")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the first repetition")
    parser.add_argument("--separate", action="store_true", help="one process at a time, started anew each repetition")
    arguments = parser.parse_args()
    arguments.models = arguments.models or (CPU_MODELS if arguments.cpu else GPU_MODELS)
    arguments.variants = arguments.variants or (CPU_VARIANTS if arguments.cpu else GPU_VARIANTS)
    if arguments.recipes:
        arguments.models, arguments.variants = tiny_models(), ("ours_eager", "stock")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if arguments.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if arguments.evaluation:
        for model in arguments.models:
            measure_evaluation(model, arguments)
        return
    # in a process of its own, which leaves nothing on the GPU
    command = [sys.executable, "-m", "benchmarks.hardware", "cpu" if arguments.cpu else "cuda"]
    limits = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    records = [record for model in arguments.models for record in measure(model, limits, arguments)]
    print(f"{json.dumps(limits)}\n{tabulate(records)}", file=sys.stderr)


if __name__ == "__main__":
    main()
