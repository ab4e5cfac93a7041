"""Everything a run will be, worked out before the model exists: data, batch, steps, schedule, disk.

In: a recipe and the number of processes. Out: a `Plan`, or a RecipeError that names all problems at once.
`describe_plan` is what `--dry-run` prints. No GPU is needed, and no weight is allocated.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clm.arguments import DEFAULTS, check_training, scheduler_kwargs
from clm.dataset import ValidationRows
from clm.inputs import CatalogueSplit, load_model_config, load_tokenizer, open_mixture, open_validation
from clm.model import check_model, check_samples, choose_attention, count_parameters
from clm.order import Order, OrderSource
from clm.recipe import Recipe
from data_prep.blocks import Blocks
from data_prep.errors import UserError
from data_prep.paths import runs_dir
from data_prep.sizes import format_bytes, format_count

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

BYTES_PER_PARAMETER = 4  # fp32 master weights


@dataclass
class Plan:
    """A resolved run. T = data.block_size; a sample is one prepared block, a row is T tokens.

    Only a dry run can have a CatalogueSplit, no config, no tokenizer, or `unchecked` sentences.
    """

    recipe: Recipe
    training: dict[str, Any]  # checked values of the training section
    splits: list[Blocks | CatalogueSplit]
    validation: list[ValidationRows]
    order: Order
    config: PretrainedConfig | None
    tokenizer: PreTrainedTokenizerBase | None
    num_parameters: int
    num_processes: int
    precision: str  # fp32, bf16 or fp16
    precision_reason: str
    attention: str
    attention_reason: str
    gradient_accumulation_steps: int
    num_steps: int
    unchecked: list[str]

    @property
    def run_folder(self) -> Path:
        """runs/<name>."""
        return runs_dir() / self.recipe.name

    @property
    def tokens_per_step(self) -> int:
        """The global batch."""
        return self.recipe.data.tokens_per_step

    @property
    def prepared_block_size(self) -> int:
        """Tokens of one prepared block, a multiple of the recipe's block_size."""
        return self.splits[0].block_size

    @property
    def samples_per_step(self) -> int:
        """Prepared blocks between two optimizer steps, over all processes."""
        return self.tokens_per_step // self.prepared_block_size

    @property
    def samples_per_micro_batch(self) -> int:
        """Prepared blocks that one device sees in one forward."""
        rows = self.training["per_device_train_batch_size"]
        return rows * self.recipe.data.block_size // self.prepared_block_size

    @property
    def seed(self) -> int:
        """training.seed: weights and dropout."""
        return self.training.get("seed", 42)

    @property
    def data_seed(self) -> int:
        """The order's seed: training.data_seed, else training.seed."""
        data_seed = self.training.get("data_seed")
        return self.seed if data_seed is None else data_seed

    @property
    def checkpoint_bytes(self) -> int:
        """Estimated size of one checkpoint: fp32 weights and the optimizer's two moments."""
        moments = 2 if "8bit" in str(self.training.get("optim", "")) else 8
        return self.num_parameters * (BYTES_PER_PARAMETER + moments)


def make_plan(recipe: Recipe, num_processes: int, dry_run: bool = False) -> Plan:
    """Resolve a recipe completely.

    Args:
        recipe: as loaded.
        num_processes: of this launch.
        dry_run: accept a listed dataset that is not prepared yet and a base model that this machine cannot reach; what
            could not be checked is listed in `Plan.unchecked`.
    Raises:
        RecipeError: every problem found in recipe, data, model and batch, at once.
    """
    problems, unchecked = recipe.problems, []
    training = check_training(recipe)
    splits = open_mixture(recipe, unchecked if dry_run else None)
    config = load_model_config(recipe, unchecked if dry_run else None)
    tokenizer = load_tokenizer(splits)
    if config is not None and tokenizer is not None:
        check_model(recipe.model, config, tokenizer, str(splits[0].folder), recipe.data.block_size, problems)
        check_samples(recipe.run.samples, config, tokenizer, problems)
    validation = open_validation(recipe, splits, training, unchecked if dry_run else None)
    accumulation = _check_batch(recipe, training, splits, num_processes)
    precision, why_precision = _choose_precision(training, problems)
    attention, why_attention = "sdpa", ""
    try:
        attention, why_attention = choose_attention(recipe.model.attention, precision == "bf16", _has_gpu(training))
    except UserError as error:
        problems.messages.append(str(error))
    problems.raise_if_any()
    seed = training.get("seed", 42)
    data_seed = training.get("data_seed")
    weights = [Fraction(str(item.weight)) for item in recipe.data.mixture]
    order = Order(
        [OrderSource(s.num_blocks, w) for s, w in zip(splits, weights, strict=True)],
        seed if data_seed is None else data_seed,
        recipe.data.shuffle,
    )
    plan = Plan(
        recipe=recipe,
        training=training,
        splits=splits,
        validation=validation,
        order=order,
        config=config,
        tokenizer=tokenizer,
        num_parameters=0 if config is None else count_parameters(config),
        num_processes=num_processes,
        precision=precision,
        precision_reason=why_precision,
        attention=attention,
        attention_reason=why_attention,
        gradient_accumulation_steps=accumulation,
        num_steps=math.ceil(recipe.data.tokens / recipe.data.tokens_per_step),
        unchecked=unchecked,
    )
    _check_passes(plan)
    _check_disk(plan)
    problems.raise_if_any()
    return plan


def _check_batch(recipe: Recipe, training: dict[str, Any], splits: list[Blocks], num_processes: int) -> int:
    """Gradient accumulation from the global batch; refuses what does not divide, with the nearest values."""
    data, problems = recipe.data, recipe.problems
    rows = training.get("per_device_train_batch_size")
    if not isinstance(rows, int) or rows < 1 or not splits:
        return 1
    prepared = splits[0].block_size
    if prepared % data.block_size:
        divisors = [d for d in range(1, prepared + 1) if prepared % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - data.block_size))[:2]
        problems.add(
            "data.block_size",
            f"is {data.block_size} but {splits[0].folder} has blocks of {prepared}, which it does not divide. "
            f"Use {' or '.join(map(str, sorted(near)))}, or prepare the data again with --block-size "
            f"{data.block_size}.",
        )
        return 1
    micro = rows * data.block_size
    if micro % prepared:
        step = prepared // data.block_size
        near = sorted({max(step, rows // step * step), (rows // step + 1) * step})
        problems.add(
            "training.per_device_train_batch_size",
            f"is {rows} rows of {data.block_size} but a micro-batch holds whole prepared blocks of {prepared} tokens "
            f"({step} rows). Use {' or '.join(map(str, near))}.",
        )
        return 1
    together = micro * num_processes
    if data.tokens_per_step % together:
        low = data.tokens_per_step // together * together
        near = " or ".join(str(v) for v in (low, low + together) if v)
        problems.add(
            "data.tokens_per_step",
            f"is {data.tokens_per_step:,} but must be a multiple of {rows} rows x {data.block_size} tokens x "
            f"{num_processes} processes = {together:,}. Use {near}, or another per_device_train_batch_size.",
        )
        return 1
    return data.tokens_per_step // together


def _check_passes(plan: Plan) -> None:
    limit = plan.recipe.data.max_epochs
    samples = plan.num_steps * plan.samples_per_step
    for item, split, passes in zip(plan.recipe.data.mixture, plan.splits, plan.order.passes(samples), strict=True):
        if passes > limit and split.num_tokens:
            have = split.num_tokens
            plan.recipe.problems.add(
                "data.tokens",
                f"is {format_count(plan.recipe.data.tokens)}, which passes {passes:.1f} times over {item.dataset} "
                f"({format_count(have)} tokens) but data.max_epochs is {limit:g}. Set data.tokens to at most "
                f"{format_count(int(plan.recipe.data.tokens * limit / passes))}, add data, or raise data.max_epochs.",
            )


def _check_disk(plan: Plan) -> None:
    existing = next(p for p in (plan.run_folder, *plan.run_folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    need = plan.checkpoint_bytes + plan.num_parameters * BYTES_PER_PARAMETER
    if free < need:
        plan.recipe.problems.add(
            "training.save_total_limit",
            f"needs room for a checkpoint and final/ ({format_bytes(need)}) but {existing} has {format_bytes(free)} "
            "free. Free some, or set RUNS_DIR to another disk.",
        )


def _has_gpu(training: dict[str, Any]) -> bool:
    import torch

    return torch.cuda.is_available() and not training.get("use_cpu", False)


def _choose_precision(training: dict[str, Any], problems: Any) -> tuple[str, str]:
    """bf16 where the GPU has it, else fp32; what the recipe says is obeyed or refused."""
    import torch

    if training.get("bf16") and training.get("fp16"):
        problems.add("training.fp16", "is true together with training.bf16. Choose one; bf16 needs no loss scaling.")
    if training.get("fp16"):
        if not _has_gpu(training):
            problems.add("training.fp16", "is true but there is no CUDA GPU. Remove it.")
        return "fp16", "training.fp16 is true"
    if training.get("bf16") is not None:
        return ("bf16" if training["bf16"] else "fp32"), f"training.bf16 is {str(training['bf16']).lower()}"
    if not _has_gpu(training):
        return "fp32", "there is no CUDA GPU"
    if torch.cuda.is_bf16_supported():
        return "bf16", f"{torch.cuda.get_device_name()} has it; weights stay fp32"
    return "fp32", f"{torch.cuda.get_device_name()} has no bf16"


def learning_rates(plan: Plan, steps: list[int]) -> list[float]:
    """The learning rate that optimizer step k (0-based) uses, from the same scheduler that Trainer builds."""
    import torch
    from transformers import get_scheduler

    peak = plan.training["learning_rate"]
    warmup = plan.training.get("warmup_steps", 0) or 0
    warmup = int(warmup) if warmup >= 1 else math.ceil(plan.num_steps * warmup)
    scheduler = get_scheduler(
        plan.training.get("lr_scheduler_type", "linear"),
        optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak),
        num_warmup_steps=warmup,
        num_training_steps=plan.num_steps,
        scheduler_specific_kwargs=scheduler_kwargs(plan.training, plan.num_steps),
    )
    return [peak * scheduler.lr_lambdas[0](step) for step in steps]


def describe_plan(plan: Plan) -> str:
    """What `--dry-run` prints: the whole run in numbers, products written out."""
    data, last = plan.recipe.data, plan.num_steps - 1
    rows = plan.training["per_device_train_batch_size"]
    marks = sorted({0, plan.num_steps // 10, plan.num_steps // 2, last})
    rates = "   ".join(f"step {s:,}: {rate:.3g}" for s, rate in zip(marks, learning_rates(plan, marks), strict=True))
    samples = plan.num_steps * plan.samples_per_step
    keep = plan.training.get("save_total_limit", DEFAULTS["save_total_limit"])
    weights = "random weights" if plan.recipe.model.init == "random" else f"weights of {plan.recipe.model.init}"
    lines = [
        f"run          {plan.recipe.name} -> {plan.run_folder}",
        f"model        {weights}"
        if plan.config is None
        else f"model        {plan.config.model_type}, {plan.num_parameters:,} parameters "
        f"({plan.num_parameters / 1e6:.2f} x 10^6, {plan.num_parameters / 2**20:.2f} x 2^20), {weights}",
        f"precision    {plan.precision}: {plan.precision_reason}",
        f"attention    {plan.attention}: {plan.attention_reason}",
        f"batch        {rows} rows x {data.block_size} tokens x {plan.num_processes} processes x "
        f"{plan.gradient_accumulation_steps} accumulation = {plan.tokens_per_step:,} tokens per step",
        f"length       ceil({data.tokens:,} tokens / {plan.tokens_per_step:,}) = {plan.num_steps:,} steps "
        f"= {plan.num_steps * plan.tokens_per_step:,} tokens",
        f"schedule     {plan.training.get('lr_scheduler_type', 'linear')}   {rates}",
    ]
    for item, split, share, passes in zip(
        data.mixture, plan.splits, plan.order.shares, plan.order.passes(samples), strict=True
    ):
        size = f"{split.num_tokens:,} tokens, {passes:.3f} passes" if split.num_tokens else "size not known yet"
        lines.append(
            f"data         {item.dataset}: {100 * float(share):.4g} % of the run, blocks of {split.block_size}, {size}"
        )
    for rows_ in plan.validation:
        lines.append(f"validation   {rows_.name}: {rows_.num_rows * data.block_size:,} tokens")
    if not plan.validation:
        lines.append("validation   none" + (" yet" if plan.unchecked else ""))
    if plan.num_parameters:
        lines.append(
            f"disk         up to {keep} + 1 checkpoints of about {format_bytes(plan.checkpoint_bytes)} and final/ of "
            f"{format_bytes(plan.num_parameters * BYTES_PER_PARAMETER)} under {plan.run_folder}"
        )
    lines += [f"not checked  {sentence}" for sentence in plan.unchecked]
    return "\n".join(lines)
