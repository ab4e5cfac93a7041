"""Everything a run will be, worked out before the model exists: data, batch, steps, schedule, disk.

In: a recipe and the number of processes. Out: a `Plan`, or a RecipeError that names all problems at once.
No GPU is needed, and no weight is allocated.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clm.arguments import check_training
from clm.dataset import ValidationRows
from clm.divided import tp_size
from clm.document_mask import DocumentMask
from clm.ema import check_ema
from clm.fsdp import check_fsdp
from clm.inputs import CatalogueSplit, cannot_be_split, load_model_config, load_tokenizer, open_mixture, open_validation
from clm.layout import lay_out, make_order, make_timeline
from clm.model import check_model, check_samples, count_parameters, with_rope
from clm.order import Order
from clm.precision import check_fp8, choose_precision, has_gpu
from clm.recipe import Recipe
from clm.run_folder import list_checkpoints
from clm.schedule import learning_rate_factor
from clm.schedule_free import check_schedule_free
from clm.speed import Speed, choose_speed
from clm.spikes import check_policy
from clm.tensor_parallel import check_tensor_parallel
from clm.timeline import Ranges, Stage, Timeline
from data_prep.blocks import Blocks
from data_prep.errors import UserError
from data_prep.paths import runs_dir
from data_prep.sizes import format_bytes, format_count

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

BYTES_PER_PARAMETER = 4  # fp32 master weights


@dataclass(frozen=True)
class Plan:
    """A resolved run. T = a stage's block_size; a sample is one prepared block, a row is T tokens.

    Only a dry run can have a CatalogueSplit, no config, no tokenizer, or `unchecked` sentences.
    """

    recipe: Recipe
    training: dict[str, Any]  # checked values of the training section
    splits: list[Blocks | CatalogueSplit]  # one for each of recipe.data.datasets
    validation: list[ValidationRows]
    timeline: Timeline
    order: Order
    config: PretrainedConfig | None
    tokenizer: PreTrainedTokenizerBase | None
    num_parameters: int
    num_processes: int
    tp_size: int  # processes that see the same rows, each with a part of each layer; 1 without tensor parallelism
    precision: str  # fp32, bf16 or fp16
    precision_reason: str
    speed: Speed
    unchecked: list[str]

    @property
    def run_folder(self) -> Path:
        """runs/<name>."""
        return runs_dir() / self.recipe.name

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.timeline.num_steps

    @property
    def prepared_block_size(self) -> int:
        """Tokens of one prepared block, a multiple of each stage's block_size."""
        return self.splits[0].block_size

    @property
    def samples_per_micro_batch(self) -> int:
        """Prepared blocks that one device sees in one forward, the same in all stages."""
        rows = self.training["per_device_train_batch_size"]
        return rows * self.recipe.data.block_size // self.prepared_block_size

    @property
    def num_data_processes(self) -> int:
        """Processes that see other rows than each other; with tensor parallelism a group counts as one."""
        return self.num_processes // self.tp_size

    def accumulation(self, stage: Stage) -> int:
        """Micro-batches of one device between two optimizer steps of a stage."""
        return math.ceil(stage.samples_per_step / (self.samples_per_micro_batch * self.num_data_processes))

    def slots_per_step(self, stage: Stage) -> int:
        """Prepared blocks that all devices see in one step: with run.uneven_batch the last ones may be fillers."""
        return self.accumulation(stage) * self.samples_per_micro_batch * self.num_data_processes

    @property
    def attention(self) -> str:
        """The attention implementation, by the name that transformers knows."""
        return self.speed.attention

    @property
    def document_mask(self) -> DocumentMask | None:
        """What keeps the documents of a row apart; None without data.document_mask."""
        return DocumentMask(self.tokenizer.eos_token_id, self.attention) if self.recipe.data.document_mask else None

    @property
    def seed(self) -> int:
        """training.seed: weights and dropout."""
        return self.training.get("seed", 42)

    @property
    def data_seed(self) -> int:
        """The order's seed: training.data_seed, else training.seed."""
        return data_seed(self.training)

    @property
    def fingerprints(self) -> dict[str, str]:
        """What identifies the content of each dataset of the run."""
        pairs = zip(self.recipe.data.datasets, self.splits, strict=True)
        return {name: split.manifest.fingerprint for name, split in pairs}

    @property
    def weights_bytes(self) -> int:
        """The fp32 weights, and with run.ema their average: what is left of a run at its end."""
        return self.num_parameters * BYTES_PER_PARAMETER * (1 if self.recipe.run.ema.decay is None else 2)

    @property
    def optimizer_bytes(self) -> int:
        """Estimated size of the optimizer's state: two moments, Lion's one."""
        optim = str(self.training.get("optim", ""))
        moments = 1 if "lion" in optim else 2
        bits = 8 if "8bit" in optim else 4 if "4bit" in optim else 32
        return self.num_parameters * moments * bits // 8

    @property
    def checkpoint_bytes(self) -> int:
        """Estimated size of one checkpoint; a schedule-free optimizer has two sets of weights."""
        is_twofold = str(self.training.get("optim", "")).startswith("schedule_free")
        return self.weights_bytes + self.optimizer_bytes + is_twofold * self.num_parameters * BYTES_PER_PARAMETER

    def learning_rate_factor(self) -> Callable[[int], float]:
        """The share of the peak learning rate that the step after k finished ones uses (clm/schedule.py)."""
        data, run = self.recipe.data, self.recipe.run
        return learning_rate_factor(self.training, self.timeline, data.tokens_per_step, run.schedule_tokens)

    def excluding(self, excluded: Ranges) -> Plan:
        """The same run without some samples."""
        timeline = make_timeline(self.timeline.stages, excluded)
        order = make_order(timeline, self.splits, self.data_seed, self.recipe.data.shuffle)
        return replace(self, timeline=timeline, order=order)


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
        check_model(recipe.model, config, tokenizer, str(splits[0].folder), problems)
        _check_positions(recipe, config)
        check_samples(recipe.run.samples, config, tokenizer, problems)
    if recipe.run.uneven_batch and getattr(config, "output_router_logits", False):
        problems.add(
            "run.uneven_batch", "is true but this model's router would count the fillers in its loss. Remove it."
        )
    validation = open_validation(recipe, splits, training, unchecked if dry_run else None)
    stages = []
    data = recipe.data
    if splits and len(splits) == len(data.datasets) and all(data.mixture_of(stage) for stage in data.all_stages):
        stages = lay_out(recipe.data, splits, problems)
        _check_stages(recipe, training, stages, splits, max(1, num_processes // tp_size()))
    precision, why_precision = choose_precision(training, problems)
    check_policy(recipe, training, precision)
    check_schedule_free(recipe, training)
    check_fsdp(recipe, training, num_processes)
    check_tensor_parallel(recipe, training, config, num_processes)
    check_ema(recipe, training, [rows.name for rows in validation])
    block_size = max([item.block_size or data.block_size for item in data.all_stages])
    speed = choose_speed(recipe, training, config, block_size, precision, has_gpu(training))
    num_parameters = 0 if config is None else count_parameters(config)
    check_fp8(recipe, training, num_parameters, precision, speed.compiled)
    problems.raise_if_any()
    timeline = make_timeline(stages)
    plan = Plan(
        recipe=recipe,
        training=training,
        splits=splits,
        validation=validation,
        timeline=timeline,
        order=make_order(timeline, splits, data_seed(training), recipe.data.shuffle),
        config=config,
        tokenizer=tokenizer,
        num_parameters=num_parameters,
        num_processes=num_processes,
        tp_size=tp_size(),
        precision=precision,
        precision_reason=why_precision,
        speed=speed,
        unchecked=unchecked,
    )
    _check_passes(plan)
    _check_disk(plan)
    problems.raise_if_any()
    return plan


def _check_positions(recipe: Recipe, config: PretrainedConfig) -> None:
    """Every stage's rows fit the positions of the model with that stage's RoPE settings."""
    data, source = recipe.data, recipe.model.config if recipe.model.init == "random" else recipe.model.init
    for i, item in enumerate(data.all_stages):
        key = f"data.stages[{i}].rope" if item.rope else "model.rope"
        try:
            staged = with_rope(config, {**recipe.model.rope, **item.rope}, key)
        except UserError as error:
            recipe.problems.messages.append(f"{recipe.path}: {error}")
            return
        size, positions = item.block_size or data.block_size, getattr(staged, "max_position_embeddings", None)
        if positions is not None and size > positions:
            recipe.problems.add(
                f"data.stages[{i}].block_size" if item.block_size else "data.block_size",
                f"is {size} but {source} has max_position_embeddings {positions}. Set it to at most {positions}, or "
                "raise it in the config (or by rope: {max_position_embeddings: ...}).",
            )


def data_seed(training: dict[str, Any]) -> int:
    """training.data_seed, else training.seed."""
    seed = training.get("data_seed")
    return training.get("seed", 42) if seed is None else seed


def _check_stages(
    recipe: Recipe,
    training: dict[str, Any],
    stages: list[Stage],
    splits: list[Blocks | CatalogueSplit],
    num_processes: int,
) -> None:
    """Rows, micro-batch and global batch of every stage; refuses what does not divide, with the nearest values."""
    data, problems, split, prepared = recipe.data, recipe.problems, splits[0], splits[0].block_size
    rows = training.get("per_device_train_batch_size")
    num_problems = len(problems.messages)
    for stage in stages:
        key = f"data.stages[{stage.index}]" if data.stages else "data"
        padded = [s for s, share in zip(splits, stage.shares, strict=True) if share and s.is_padded]
        padded = [s for s in padded if s.block_size != stage.block_size]
        for each in padded:
            what = f"is {stage.block_size} but the stage trains on {each.folder}"
            problems.add(f"{key}.block_size", f"{what}, {cannot_be_split(each, stage.block_size)}")
        if prepared % stage.block_size and not padded:
            divisors = [d for d in range(1, prepared + 1) if prepared % d == 0]
            near = sorted(divisors, key=lambda d: abs(d - stage.block_size))[:2]
            problems.add(
                f"{key}.block_size",
                f"is {stage.block_size} but {split.folder} has blocks of {prepared}, which it does not divide. "
                f"Use {' or '.join(map(str, sorted(near)))}, or prepare the data again with --block-size "
                f"{stage.block_size}.",
            )
    if all(stage.schedule for stage in stages):  # then nothing is left for the run's own schedule
        unused = {"training.lr_scheduler_type": "lr_scheduler_type" in training}
        unused["run.schedule_tokens"] = recipe.run.schedule_tokens is not None
        for name in (name for name, is_set in unused.items() if is_set):
            problems.add(name, "is set but every stage has a schedule of its own. Remove it.")
    if not isinstance(rows, int) or rows < 1 or len(problems.messages) > num_problems:
        return
    micro = rows * data.block_size
    if micro % prepared:
        step = prepared // data.block_size
        near = sorted({max(step, rows // step * step), (rows // step + 1) * step})
        problems.add(
            "training.per_device_train_batch_size",
            f"is {rows} rows of {data.block_size} but a micro-batch holds whole prepared blocks of {prepared} tokens "
            f"({step} rows). Use {' or '.join(map(str, near))}.",
        )
        return
    is_uneven = recipe.run.uneven_batch  # then only whole prepared blocks are needed
    together = prepared if is_uneven else micro * num_processes
    for stage in stages:
        if stage.tokens_per_step % together:
            is_own = bool(data.stages) and data.stages[stage.index].tokens_per_step is not None
            low = stage.tokens_per_step // together * together
            near = " or ".join(str(v) for v in (low, low + together) if v)
            problems.add(
                f"data.stages[{stage.index}].tokens_per_step" if is_own else "data.tokens_per_step",
                f"is {stage.tokens_per_step:,} but must be a multiple of the prepared blocks' {prepared:,}. Use {near}."
                if is_uneven
                else f"is {stage.tokens_per_step:,} but must be a multiple of {rows} rows x {data.block_size} tokens x "
                f"{num_processes} processes = {together:,}. Use {near}, or another per_device_train_batch_size; or "
                "keep it with run.uneven_batch: true, which fills the last micro-batches with rows that do not count.",
            )
            if not is_own:
                return


def _check_passes(plan: Plan) -> None:
    data, limit = plan.recipe.data, plan.recipe.data.max_epochs
    every_passes = plan.order.passes(plan.timeline.num_samples)
    for index, (name, split, passes) in enumerate(zip(data.datasets, plan.splits, every_passes, strict=True)):
        if passes > limit and split.num_tokens:
            arithmetic = " + ".join(
                format_count(int(stage.num_tokens * stage.shares[index]))
                for stage in plan.timeline.stages
                if stage.shares[index]
            )
            remedy = "Give it less"
            if not data.stages and data.tokens is not None:
                remedy = f"Set data.tokens to at most {format_count(int(data.tokens * limit / passes))}"
            plan.recipe.problems.add(
                "data.stages" if data.stages else "data.tokens" if data.tokens is not None else data.datasets[name],
                f"asks for {arithmetic} tokens of {name}, which has {format_count(split.num_tokens)}: {passes:.1f} "
                f"passes, but data.max_epochs is {limit:g}. {remedy}, add data, or raise data.max_epochs.",
            )


def _check_disk(plan: Plan) -> None:
    existing = next(p for p in (plan.run_folder, *plan.run_folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    need = plan.checkpoint_bytes + plan.weights_bytes
    if free < need and not list_checkpoints(plan.run_folder):  # with checkpoints, run.retention may make room
        plan.recipe.problems.add(
            "run.retention",
            f"needs room for a checkpoint and final/ ({format_bytes(need)}) but {existing} has {format_bytes(free)} "
            "free. Free some, or set RUNS_DIR to another disk.",
        )
