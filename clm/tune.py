"""`python -m clm tune RECIPE`: the fastest micro-batch for this machine, at the recipe's own global batch.

In: a recipe and its prepared data. Out: a table of micro-batches with tokens per second and peak memory, and the line
to write into the recipe. What is trained does not change: the global batch, its order and the optimizer stay, only how
much of it a device sees at once does (`training.per_device_train_batch_size`), and accumulation follows.

Every candidate is a process of its own that trains a few real steps with run_clm.py's trainer (clm/tune_trial.py), so
that nothing is left of one that ran out of memory. Those near to the fastest are measured twice, in the other order.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from clm.divided import is_engine_used
from clm.plan import Plan, make_plan
from clm.recipe import load_recipe
from clm.timeline import Stage
from clm.tune_lab import WARM_UP, Lab
from clm.tune_recipe import check_writable, write_rows
from clm.tune_search import SAME, Candidate, candidates, choose, search
from data_prep.errors import UserError
from data_prep.paths import runs_dir
from data_prep.sizes import format_bytes, format_count

LOOK_AGAIN = 0.05  # what lies so near to the fastest, or has such a spread, is measured a second time


def tune_recipe(
    path: str, overrides: Sequence[str] = (), num_processes: int | None = None, num_steps: int = 5, write: bool = False
) -> int:
    """Tune a recipe and print what was found; the exit code.

    Args:
        path: the recipe.
        overrides: section.key=value, as for run_clm.py.
        num_processes: of the run that is tuned for; None: as many as there are GPUs, one without.
        num_steps: measured ones of each candidate, at least.
        write: put the value into the recipe.
    Raises:
        UserError: the recipe has a mistake, its data is not prepared, nothing fits, or it cannot be written.
    """
    import torch

    if write:
        check_writable(path, overrides)
    recipe = load_recipe(path, list(overrides))
    if num_processes is None:
        has_gpu = torch.cuda.is_available() and not recipe.training.get("use_cpu", False)
        num_processes = torch.cuda.device_count() if has_gpu else 1
    plan = make_plan(recipe, num_processes)
    if is_engine_used(plan.training):
        raise UserError(
            f"{path}: the launcher divides the weights among processes, and what fits a device then depends on "
            "all of them; tune measures one device that holds the whole model. Try values by hand: metrics.jsonl has "
            "tokens_per_s and peak_memory_bytes."
        )
    # one micro-batch for all stages: the longest rows need most memory
    stage = max(plan.timeline.stages, key=lambda each: (each.block_size, each.num_tokens))
    found = candidates(plan, stage)
    now = next(each for each in found if each.samples == plan.samples_per_micro_batch)
    print(_headline(path, plan, stage, num_steps), flush=True)
    try:
        runs_dir().mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".tune-", dir=runs_dir()))
    except OSError as error:
        raise UserError(
            f"{runs_dir()}: cannot be written ({error.strerror}). Set RUNS_DIR to another folder."
        ) from None
    tried: list[Candidate] = []
    try:
        lab = Lab(folder, plan, stage, num_steps)

        def measure(candidate: Candidate) -> None:
            if candidate not in tried:
                tried.append(candidate)
            lab.measure(candidate)

        search(found, found.index(now), measure)
        limit = min(each.step_s for each in tried) * (1 + LOOK_AGAIN)
        unclear = (c for c in reversed(tried) if c.step_s <= limit or c.spread > LOOK_AGAIN or c is now)
        again = [each for each in unclear if each.steps]
        for each in again if len(again) > 1 else ():
            measure(each)
    except BaseException:  # Ctrl-C, or a trial that failed: what is measured is shown
        if any(each.steps for each in tried):
            print(_tabulate(tried, now, plan, stage))
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(_tabulate(tried, now, plan, stage))
    best = choose(tried, now)
    if best is None:
        raise UserError(
            f"{path}: a micro-batch of {found[0].rows} rows, the smallest, does not fit. Set "
            "training.gradient_checkpointing: true, or take a smaller model or data.block_size."
        )
    memory = f", {format_bytes(lab.device_bytes)}" if lab.device_bytes else ""
    print(f"measured on: {lab.device}{memory}\n\ntraining.per_device_train_batch_size: {best.rows}\n")
    print(_compare(best, now))
    if write and best is not now:
        write_rows(path, best.rows)
        print(f"{path}: changed, nothing else in it. Comments that write the product out may be old now.")
    return 0


def _headline(path: str, plan: Plan, stage: Stage, num_steps: int) -> str:
    speed, processes = plan.speed, "process" if plan.num_processes == 1 else "processes"
    which = f", measured in {stage.name}" if len(plan.timeline.stages) > 1 else ""
    return (
        f"tune {path}: {stage.tokens_per_step:,} tokens per step on {plan.num_processes} {processes}, whatever the "
        f"micro-batch{which}\n"
        f"{format_count(plan.num_parameters)} parameters, {plan.precision}, attention {plan.attention}, loss "
        f"{speed.loss or 'of the model'}, {'' if speed.compiled else 'not '}compiled; measured steps of "
        f"each: {num_steps} or more, after {WARM_UP} to warm up"
    )


def _tabulate(tried: list[Candidate], now: Candidate, plan: Plan, stage: Stage) -> str:
    per_device = " per process" if plan.num_processes > 1 else ""
    lines = [f"\n{'rows':>8}  {'accumulation':>12}  {f'tokens/s{per_device}':>20}  {'spread':>7}  {'peak memory':>11}"]
    for each in sorted(tried, key=lambda c: c.samples):
        line = f"{each.rows:>8,}  {each.accumulation:>12,}  "
        if each.steps:
            rate = stage.tokens_per_step / plan.num_processes / each.step_s
            line += f"{rate:>20,.0f}  {f'± {each.spread:.1%}':>7}  {format_bytes(each.peak_bytes):>11}"
        else:
            line += f"{'out of memory' if each.is_out_of_memory else 'not measured':>20}"
        lines.append(line + ("  the recipe's" if each is now else ""))
    return "\n".join(lines) + "\n"


def _compare(best: Candidate, now: Candidate) -> str:
    if best is now:
        return f"It is the recipe's own: nothing is faster by more than {SAME:.0%} and the spread of steps."
    if not now.steps:
        return f"The recipe's {now.rows} does not fit."
    return f"{now.step_s / best.step_s - 1:.1%} faster than the recipe's {now.rows}."
