"""A plan in words and numbers, products written out: what `--dry-run` prints and a run begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clm.arguments import DEFAULTS
from data_prep.blocks import Blocks
from data_prep.sizes import format_bytes, format_count

if TYPE_CHECKING:
    from clm.plan import Plan
    from clm.timeline import Stage


def learning_rates(plan: Plan, steps: list[int]) -> list[float]:
    """The learning rate of the optimizer step after k finished ones, for each k of `steps`."""
    factor = plan.learning_rate_factor()
    return [plan.training["learning_rate"] * factor(k) for k in steps]


def describe_plan(plan: Plan) -> str:
    """The whole run in lines of `name  text`."""
    data, timeline = plan.recipe.data, plan.timeline
    weights = "random weights" if plan.recipe.model.init == "random" else f"weights of {plan.recipe.model.init}"
    lines = [
        f"run          {plan.recipe.name} -> {plan.run_folder}",
        f"model        {weights}"
        if plan.config is None
        else f"model        {plan.config.model_type}, {plan.num_parameters:,} parameters "
        f"({plan.num_parameters / 1e6:.2f} x 10^6, {plan.num_parameters / 2**20:.2f} x 2^20), {weights}",
        f"precision    {plan.precision}{', matrix products of the blocks in fp8' if plan.recipe.model.fp8 else ''}: "
        f"{plan.precision_reason}",
        f"attention    {plan.attention}: {plan.speed.attention_reason}",
        *_speed(plan),
    ]
    if data.document_mask:
        lines.append("documents    masked: no attention across them, positions restart, no target after an end")
    if not data.stages:
        stage = timeline.stages[0]
        asked = f"ceil({data.tokens:,} tokens / {stage.tokens_per_step:,}) = " if data.tokens is not None else ""
        lines.append(f"batch        {_batch(plan, stage)}")
        lines.append(f"length       {asked}{timeline.num_steps:,} steps = {timeline.num_tokens:,} tokens")
    else:
        for stage in timeline.stages:
            lines.append(
                f"stage        {stage.name}: steps {stage.first_step + 1:,} to {stage.last_step:,}, "
                f"{stage.num_tokens:,} tokens of {_mixture(plan, stage)}"
            )
            lines.append(f"             {_batch(plan, stage)}{_changes(stage)}")
        lines.append(f"length       {timeline.num_steps:,} steps = {timeline.num_tokens:,} tokens")
    lines.append(_schedule(plan))
    lines += _datasets(plan)
    lines += _padding(plan)
    for rows in plan.validation:
        lines.append(f"validation   {rows.name}: {rows.num_rows * data.block_size:,} tokens")
    if not plan.validation:
        lines.append("validation   none" + (" yet" if plan.unchecked else ""))
    if plan.num_parameters:
        lines.append(_disk(plan))
    lines += [f"not checked  {sentence}" for sentence in plan.unchecked]
    return "\n".join(lines)


def _speed(plan: Plan) -> list[str]:
    speed = plan.speed
    loss = f"{speed.loss}, without logits" if speed.loss else "of the model's own forward"
    muon, z_loss = plan.recipe.run.muon, plan.recipe.run.z_loss
    if z_loss:
        loss += f", with z-loss {z_loss:g} x (log Z)^2"
    optimizer = plan.training.get("optim", DEFAULTS["optim"])
    if plan.recipe.run.optimizer == "muon":
        optimizer = f"muon at {muon.learning_rate:g} for hidden matrices, {optimizer} for the rest"
    decay = plan.recipe.run.ema.decay
    return [
        f"optimizer    {optimizer}",
        *([f"average      of the weights, decay {decay:g} (run.ema)"] if decay is not None else []),
        f"loss         {loss}: {speed.loss_reason}",
        f"compiled     {'yes' if speed.compiled else 'no'}: {speed.compiled_reason}",
    ]


def _batch(plan: Plan, stage: Stage) -> str:
    rows = plan.samples_per_micro_batch * plan.prepared_block_size // stage.block_size
    who = f"{plan.num_processes} processes"
    if plan.tp_size > 1:
        groups = "group" if plan.num_data_processes == 1 else "groups"
        who = f"{plan.num_data_processes} {groups} of {plan.tp_size} processes (tensor parallel)"
    product = f"{rows} rows x {stage.block_size} tokens x {who} x {plan.accumulation(stage)}"
    slots, used = plan.slots_per_step(stage), stage.samples_per_step
    if slots == used:
        return f"{product} accumulation = {stage.tokens_per_step:,} tokens per step"
    return (
        f"{product} accumulation = {slots * plan.prepared_block_size:,} tokens, of which {stage.tokens_per_step:,} "
        f"count: {100 * (slots - used) / slots:.1f} % of the work is filling (run.uneven_batch)"
    )


def _mixture(plan: Plan, stage: Stage) -> str:
    named = zip(plan.recipe.data.datasets, stage.shares, strict=True)
    return ", ".join(f"{name} {100 * float(share):.4g} %" for name, share in named if share)


def _changes(stage: Stage) -> str:
    text = f", RoPE {', '.join(f'{k} {v}' for k, v in stage.rope)}" if stage.rope else ""
    if stage.schedule is None:
        return text
    end = "" if stage.schedule.end is None else f" to {stage.schedule.end:g} x the peak"
    return f"{text}, schedule {stage.schedule.shape}{end}"


def _schedule(plan: Plan) -> str:
    last = plan.num_steps - 1
    marks = sorted({0, plan.num_steps // 10, plan.num_steps // 2, last, *(s.first_step for s in plan.timeline.stages)})
    rates = "   ".join(f"step {k:,}: {rate:.3g}" for k, rate in zip(marks, learning_rates(plan, marks), strict=True))
    kind = plan.training.get("lr_scheduler_type", "linear")
    if all(stage.schedule for stage in plan.timeline.stages):
        kind = "by stage"
    span = plan.recipe.run.schedule_tokens
    return f"schedule     {kind}{f' over {span:,} tokens' if span else ''}   {rates}"


def _datasets(plan: Plan) -> list[str]:
    """Per dataset: its share of the run, how often it is passed over, and how much is left until pass 2, 3, 4."""
    data, lines = plan.recipe.data, []
    passes = plan.order.passes(plan.timeline.num_samples)
    used = plan.order.counts_before(plan.timeline.num_samples)
    for name, split, done, count in zip(data.datasets, plan.splits, passes, used, strict=True):
        share = 100 * count / plan.timeline.num_samples
        size = f"{split.num_tokens:,} tokens, {done:.3f} passes" if split.num_tokens else "size not known yet"
        left = [
            f"pass {number} {format_count((number - 1) * split.num_tokens - count * split.block_size)}"
            for number in (2, 3, 4)
            if (number - 1) * split.num_tokens > count * split.block_size
        ]
        if isinstance(split, Blocks) and split.is_padded:
            size += f", {100 * split.padding_fraction:.3g} % of them padding ({split.manifest.packing})"
        until = f"; left until {', '.join(left)} tokens" if left else ""
        lines.append(f"data         {name}: {share:.4g} % of the run, blocks of {split.block_size}, {size}{until}")
    return lines


def _padding(plan: Plan) -> list[str]:
    """How much of the run is padding, which is counted as tokens and trains nothing."""
    used = plan.order.counts_before(plan.timeline.num_samples)
    shares = [split.padding_fraction if isinstance(split, Blocks) else 0.0 for split in plan.splits]
    fraction = sum(count * share for count, share in zip(used, shares, strict=True)) / plan.timeline.num_samples
    num_text = round(plan.timeline.num_tokens * (1 - fraction))
    text = f"{100 * fraction:.3g} % of all positions: about {num_text:,} of the run's tokens are text"
    return [f"padding      {text}"] if fraction else []


def _disk(plan: Plan) -> str:
    keep = plan.recipe.run.retention
    parts = [f"up to {keep.last} + 1 checkpoints"]
    if keep.best:
        parts.append(f"the {keep.best} best")
    if keep.every_tokens:
        parts.append(f"one every {format_count(keep.every_tokens)} tokens")
    if keep.weights != "none":
        parts.append(f"the weights of {'all' if keep.weights == 'all' else keep.weights} others")
    finals = "final/" if plan.recipe.run.ema.decay is None else "final/ and final-ema/"
    return (
        f"disk         {', '.join(parts)}, about {format_bytes(plan.checkpoint_bytes)} each, and {finals} of "
        f"{format_bytes(plan.weights_bytes)} under {plan.run_folder}"
    )
