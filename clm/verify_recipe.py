"""A small copy of a recipe, for `verify`: its data, order, mixture, stages, optimizer and schedule on a tiny model.

In: a recipe. Out: the same recipe with a tiny Llama, few steps and small global batches, to be trained on the CPU.

    10,000 steps of 512 blocks, warm-up 500, stages of 6,000 and 4,000 steps
    -> 24 steps of 4 blocks, warm-up 2 (rounded up), stages of 15 and 9 steps

What stays as it is: datasets, shares, seeds, the row length of every stage, the proportions of stages and batches, the
shape of the schedule, RoPE, document masking, the optimizer and all its values.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import yaml

from clm.plan import Plan, make_plan
from clm.recipe import Recipe, load_recipe

# What says how a run uses its machine: the copy runs in fp32 on the CPU, alone, and is thrown away.
_OF_THE_MACHINE = {"bf16", "fp16", "tf32", "deepspeed", "gradient_checkpointing", "gradient_checkpointing_kwargs"}
_OF_THE_MACHINE |= {"activation_checkpointing", "activation_checkpointing_kwargs", "report_to", "accelerator_config"}
_OF_THE_MACHINE |= {"ddp_backend", "run_name", "torch_compile", "torch_compile_backend", "torch_compile_mode"}
_OF_THE_MACHINE |= {"torch_empty_cache_steps", "use_liger_kernel", "liger_kernel_config", "push_to_hub"}
_PREFIXES = ("dataloader_", "hub_", "save_", "eval_", "logging_", "trackio_")
_ROPE_OF_ANY_WIDTH = ("default", "linear", "dynamic", "yarn", "llama3")  # longrope has factors per dimension
_COUNTS_OF_STEPS = ("num_decay_steps", "num_stable_steps", "timescale")  # in lr_scheduler_kwargs
MOST_BLOCKS = 16  # of a global batch
SAVE_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one global batch is divided."""

    num_processes: int
    blocks_per_micro_batch: int
    num_workers: int

    def __str__(self) -> str:
        return (
            f"{self.num_processes} {'process' if self.num_processes == 1 else 'processes'} x "
            f"{self.blocks_per_micro_batch} block{'' if self.blocks_per_micro_batch == 1 else 's'}, "
            f"{self.num_workers} workers"
        )


def plan_whole(recipe: Recipe) -> Plan:
    """The plan of the recipe itself, without what belongs to a machine.

    Raises:
        RecipeError: its problems, as for a training.
    """
    recipe.training = {
        name: value
        for name, value in recipe.training.items()
        if name not in _OF_THE_MACHINE and not name.startswith(_PREFIXES)
    }
    recipe.training["use_cpu"] = True
    recipe.model = dataclasses.replace(recipe.model, attention="auto", residual_dtype="fp32")
    return make_plan(recipe, num_processes=1)


def write_copies(whole: Plan, folder: Path, num_steps: int, num_processes: int) -> dict[bool, Path]:
    """Write the small copy's recipe twice: with dropout (True), where a lost random state shows, and without (False).

    Args:
        whole: the recipe's own plan.
        folder: for recipes and configs.
        num_steps: of the copy; each stage has at least 2 x SAVE_STEPS.
        num_processes: the most processes that the copy's global batches will be divided among.
    """
    copies = {}
    for dropout in (True, False):
        config = folder / f"tiny{'' if dropout else '-without-dropout'}.json"
        config.write_text(json.dumps(_tiny_config(whole, 0.1 if dropout else 0.0), indent=1), encoding="utf-8")
        copies[dropout] = config.with_suffix(".yaml")
        document = _shrink(whole, num_steps, 2 * num_processes)
        document["model"] |= {"config": str(config), "init": "random", "attention": "auto", "residual_dtype": "fp32"}
        if not dropout:  # for layouts, whose sums differ in the last bits: Muon's bf16 would make more of them
            document["run"] |= {"optimizer": "trainer", "muon": {}}
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
        copies[dropout].write_text(text, encoding="utf-8")
    return copies


def overrides_for(plan: Plan, layout: Layout) -> list[str]:
    """What divides the copy's global batches so."""
    rows = layout.blocks_per_micro_batch * plan.prepared_block_size // plan.recipe.data.block_size
    return [
        f"training.per_device_train_batch_size={rows}",
        f"training.dataloader_num_workers={layout.num_workers}",
    ]


def load_copy(path: Path, name: str) -> Plan:
    """The plan of a written copy as run `name`."""
    return make_plan(load_recipe(path, [f"training.run_name={name}"]), num_processes=1)


def _tiny_config(whole: Plan, dropout: float) -> dict[str, Any]:
    config = whole.config
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") not in _ROPE_OF_ANY_WIDTH:
        rope = {}
    positions = [getattr(config, "max_position_embeddings", 0) or 0, *(s.block_size for s in whole.timeline.stages)]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": max(positions),
        "tie_word_embeddings": True,
        "attention_dropout": dropout,
        **({"rope_parameters": rope} if rope else {}),
    }


def _shrink(whole: Plan, num_steps: int, unit: int) -> dict[str, Any]:
    """The recipe's sections with everything that counts tokens or steps made smaller in proportion.

    Args:
        unit: global batches are multiples of so many blocks.
    """
    document = whole.recipe.to_dict()
    data, run, training = document["data"], document["run"], document["training"]
    prepared, stages = whole.prepared_block_size, whole.timeline.stages
    share = unit / min(stage.samples_per_step for stage in stages)

    def shrink_batch(tokens_per_step: int) -> int:
        blocks = tokens_per_step / prepared * share
        return min(MOST_BLOCKS // unit * unit or unit, max(1, round(blocks / unit)) * unit) * prepared

    items = [{k: v for k, v in item.items()} for item in data["stages"]] or [{"name": "main"}]
    for stage, item in zip(stages, items, strict=True):
        steps = max(2 * SAVE_STEPS, round(num_steps * stage.num_steps / whole.num_steps))
        own = item.get("mixture") or data["mixture"]
        if any(entry.get("weight") is None for entry in own):  # amounts would say a length too
            names = list(whole.recipe.data.datasets)
            own = [{"dataset": n, "weight": float(s)} for n, s in zip(names, stage.shares, strict=True) if s]
        item["mixture"] = own
        item["tokens_per_step"] = shrink_batch(stage.tokens_per_step)
        item["tokens"] = steps * item["tokens_per_step"]
    before = data["tokens_per_step"]
    data["tokens_per_step"] = shrink_batch(before)
    num_tokens = sum(item["tokens"] for item in items)
    if data["stages"]:
        data.update(stages=items, mixture=[], tokens=None)
    else:
        data.update(mixture=items[0]["mixture"], tokens=num_tokens, stages=[])
    data.update(validation=[], max_epochs=1e9)

    horizon_before = math.ceil((run["schedule_tokens"] or whole.timeline.num_tokens) / before)
    if run["schedule_tokens"]:
        run["schedule_tokens"] = round(run["schedule_tokens"] / whole.timeline.num_tokens * num_tokens)
    ratio = math.ceil((run["schedule_tokens"] or num_tokens) / data["tokens_per_step"]) / horizon_before
    for name in ("warmup_tokens", "decay_tokens"):
        if run[name] is not None:
            run[name] = max(1, round(run[name] / before * ratio * data["tokens_per_step"]))
    if training.get("warmup_steps", 0) >= 1:
        training["warmup_steps"] = max(1, math.ceil(training["warmup_steps"] * ratio))
    kwargs = training.get("lr_scheduler_kwargs") or {}
    for name in _COUNTS_OF_STEPS:
        if isinstance(kwargs.get(name), int):
            kwargs[name] = max(1, round(kwargs[name] * ratio))
    training["per_device_train_batch_size"] = prepared // data["block_size"]
    training.update(logging_steps=1, save_steps=SAVE_STEPS, ddp_timeout=60)
    run.update(samples={}, spikes={"policy": "log"}, preflight=False, record_blocks=True, retention={"last": 2})
    return {name: _without_unset(section) for name, section in document.items()}


def _without_unset(section: dict[str, Any]) -> dict[str, Any]:
    empty = {"mixture", "stages"}
    return {key: value for key, value in section.items() if value is not None and (value or key not in empty)}
