"""The recipe's `training:` section -> transformers.TrainingArguments.

In: the mapping as the user wrote it. Out: checked values (`check_training`), and later the real TrainingArguments
with what the plan derives (`build_arguments`). Names, types and choices come from the installed transformers, so a
key is valid here exactly when Trainer knows it.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from pathlib import Path
from typing import Any

from clm.problems import Problems
from clm.recipe import Recipe

# Keys of TrainingArguments that this project derives or cannot honour -> what to write instead.
DERIVED = {
    "max_steps": "It follows from data.tokens / data.tokens_per_step; set data.tokens.",
    "num_train_epochs": "The run's length is data.tokens.",
    "gradient_accumulation_steps": "It follows from data.tokens_per_step, the micro-batch and the number of devices.",
    "output_dir": "A run lies under runs/<name>; set training.run_name, or the environment variable RUNS_DIR.",
    "ignore_data_skip": "Resuming starts at the exact sample by itself.",
    "resume_from_checkpoint": "The same command continues from the newest complete checkpoint by itself.",
    "auto_find_batch_size": "It would change the global batch. Lower training.per_device_train_batch_size.",
    "train_sampling_strategy": "The order is data.shuffle, data.mixture and training.data_seed.",
    "length_column_name": "All blocks have one length.",
    "dataloader_drop_last": "Every batch is full.",
    "dataloader_in_order": "The order never changes.",
    "remove_unused_columns": "Blocks have one column.",
    "label_names": "Labels are the next tokens.",
    "label_smoothing_factor": "It is not supported: the reported loss would no longer be the cross entropy.",
    "include_num_input_tokens_seen": "metrics.jsonl has tokens at every log point.",
    "prediction_loss_only": "Evaluation only sums losses.",
    "include_for_metrics": "Evaluation only sums losses.",
    "batch_eval_metrics": "Evaluation only sums losses.",
    "eval_do_concat_batches": "Evaluation only sums losses.",
    "eval_accumulation_steps": "Evaluation keeps no logits.",
    "eval_use_gather_object": "Evaluation only sums losses.",
    "eval_on_start": "Evaluation at step 0 is always done; training.eval_strategy: 'no' switches all evaluation off.",
    "do_train": "run_clm.py trains.",
    "do_eval": "Set training.eval_strategy.",
    "do_predict": "There is nothing to predict.",
    "load_best_model_at_end": "final/ is the last step; load runs/<name>/checkpoint-<step> for another.",
    "save_total_limit": "Say which checkpoints are kept by run.retention, e.g. {last: 2}.",
    "save_only_model": "A checkpoint must be able to resume; export weights with python -m clm export.",
    "restore_callback_states_from_checkpoint": "Resuming restores what is needed.",
    "average_tokens_across_devices": "The loss is always the mean over the global batch.",
    "use_cache": "Training needs no cache.",
    "local_rank": "The launcher sets it.",
    "enable_jit_checkpoint": "It can save in the middle of a step.",
    "hub_token": "A recipe is saved and pushed. Set the environment variable HF_TOKEN or run hf auth login.",
    "fsdp": "The launcher says it, so that a recipe runs everywhere: --config_file accelerate_configs/fsdp2.yaml.",
    "fsdp_config": "The launcher says it: --config_file accelerate_configs/fsdp2.yaml.",
    "parallelism_config": "The launcher says it: accelerate_configs/hsdp.yaml, tp.yaml or tp_fsdp2.yaml.",
    "neftune_noise_alpha": "It is a fine-tuning method that would change the measured loss.",
    "bf16_full_eval": "Evaluation runs in the precision of training.",
    "fp16_full_eval": "Evaluation runs in the precision of training.",
}

# What a recipe gets when it says nothing, where Trainer's own default would hide or slow something.
DEFAULTS: dict[str, Any] = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "logging_nan_inf_filter": False,  # True replaces NaN by the mean in the logged loss, and waits for the GPU
    "ddp_find_unused_parameters": False,  # every parameter takes part; True walks the graph at each step
    "report_to": "none",
    "optim": "adamw_torch_fused",
}

# (low, high, is low allowed, is high allowed); None: no limit.
RANGES: dict[str, tuple[float, float | None, bool, bool]] = {
    "learning_rate": (0, None, False, True),
    "weight_decay": (0, None, True, True),
    "adam_beta1": (0, 1, True, False),
    "adam_beta2": (0, 1, True, False),
    "adam_epsilon": (0, None, False, True),
    "max_grad_norm": (0, None, True, True),
    "warmup_steps": (0, None, True, True),
    "per_device_train_batch_size": (1, None, True, True),
    "per_device_eval_batch_size": (1, None, True, True),
    "logging_steps": (0, None, False, True),
    "eval_steps": (0, None, False, True),
    "save_steps": (0, None, False, True),
    "dataloader_num_workers": (0, None, True, True),
    "seed": (0, 2**32 - 1, True, True),
    "data_seed": (0, 2**32 - 1, True, True),
    "eval_delay": (0, None, True, True),
}

STEP_STRATEGIES = {"eval_strategy": ("no", "steps"), "save_strategy": ("no", "steps"), "logging_strategy": ("steps",)}
SCHEDULES_THAT_NEED_A_METRIC = ("reduce_lr_on_plateau", "greedy")


def check_training(recipe: Recipe) -> dict[str, Any]:
    """Check every key and value of `training:`; problems go to recipe.problems.

    Returns:
        The values with their types settled (numbers as numbers), without defaults.
    """
    from transformers import SchedulerType, TrainingArguments
    from transformers.training_args import OptimizerNames

    problems = recipe.problems
    hints = typing.get_type_hints(TrainingArguments)
    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    checked: dict[str, Any] = {}
    for name, value in recipe.training.items():
        key = f"training.{name}"
        if name in DERIVED:
            problems.add(key, f"cannot be set. {DERIVED[name]}")
        elif name not in known:
            problems.unknown(key, name, known - set(DERIVED), "is not a TrainingArguments key")
        elif name in STEP_STRATEGIES:
            # YAML reads a bare no as false
            text = "no" if value is False else value
            if text not in STEP_STRATEGIES[name]:
                problems.add(key, f"is {value!r} but must be {' or '.join(STEP_STRATEGIES[name])}: runs count steps.")
            checked[name] = text
        else:
            checked[name] = _check_value(key, value, hints[name], problems)
    for name, choices in (
        ("lr_scheduler_type", [s.value for s in SchedulerType if s.value not in SCHEDULES_THAT_NEED_A_METRIC]),
        ("optim", [o.value for o in OptimizerNames]),
    ):
        if name in checked and checked[name] not in choices:
            problems.unknown(
                f"training.{name}", checked[name], choices, f"is {checked[name]!r}, unknown or unsupported"
            )
    if "learning_rate" not in recipe.training:
        problems.add(
            "training.learning_rate", "is missing. Trainer's default of 5e-5 is meant for fine-tuning; write 3e-4."
        )
    if "per_device_train_batch_size" not in recipe.training:
        problems.add(
            "training.per_device_train_batch_size", "is missing. Write how many rows of block_size fit a device."
        )
    _check_run_name(recipe, problems)
    _check_optimizer_package(checked, problems)
    _count_schedule_in_tokens(recipe, checked)
    _check_schedule(recipe, checked)
    return checked


def _count_schedule_in_tokens(recipe: Recipe, checked: dict[str, Any]) -> None:
    """run.warmup_tokens and run.decay_tokens as steps of data.tokens_per_step, in which all schedules count."""
    run, problems = recipe.run, recipe.problems
    tokens_per_step = max(1, recipe.data.tokens_per_step)
    if run.warmup_tokens is not None:
        if "warmup_steps" in recipe.training:
            problems.add("run.warmup_tokens", "is set together with training.warmup_steps. Remove one of them.")
        checked["warmup_steps"] = math.ceil(run.warmup_tokens / tokens_per_step)
    if run.decay_tokens is not None:
        kwargs = checked.get("lr_scheduler_kwargs") or {}
        if checked.get("lr_scheduler_type") != "warmup_stable_decay":
            problems.add(
                "run.decay_tokens",
                "is set but only training.lr_scheduler_type: warmup_stable_decay has a decay of its own. Remove it.",
            )
        elif isinstance(kwargs, dict):
            if "num_decay_steps" in kwargs:
                problems.add(
                    "run.decay_tokens",
                    "is set together with training.lr_scheduler_kwargs.num_decay_steps. Remove one of them.",
                )
            steps = math.ceil(run.decay_tokens / tokens_per_step)
            checked["lr_scheduler_kwargs"] = {**kwargs, "num_decay_steps": steps}


def _check_run_name(recipe: Recipe, problems: Problems) -> None:
    name = recipe.name
    if Path(name).name != name or name in (".", ".."):
        problems.add(
            "training.run_name", f"is {name!r} but must be a plain folder name: the run lies under runs/<name>."
        )


def _check_optimizer_package(checked: dict[str, Any], problems: Problems) -> None:
    from importlib.util import find_spec

    optim = str(checked.get("optim", ""))
    needs = None
    if optim in ("adamw_torch_4bit", "adamw_torch_8bit"):
        needs = "torchao"
    elif optim.startswith("schedule_free"):
        needs = "schedulefree"
    elif any(part in optim for part in ("bnb", "paged_", "_8bit", "lion", "ademamix")):
        needs = "bitsandbytes"
    if needs and find_spec(needs) is None:
        problems.add("training.optim", f"is {optim!r} but {needs} is not installed. Run pip install {needs}.")


def _check_schedule(recipe: Recipe, checked: dict[str, Any]) -> None:
    problems, kind = recipe.problems, checked.get("lr_scheduler_type", "linear")
    kwargs = checked.get("lr_scheduler_kwargs") or {}
    if not isinstance(kwargs, dict):
        problems.add(
            "training.lr_scheduler_kwargs", f"is {kwargs!r} but must be a mapping such as {{min_lr_rate: 0.1}}."
        )
        return
    if kind == "warmup_stable_decay" and not kwargs.get("num_decay_steps"):
        problems.add(
            "training.lr_scheduler_kwargs.num_decay_steps",
            "is missing. warmup_stable_decay needs it: steps, or a fraction of the run such as 0.2.",
        )
    if kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not {"min_lr", "min_lr_rate"} & set(kwargs):
        problems.add(
            "training.lr_scheduler_kwargs.min_lr_rate",
            f"is missing. {kind} needs the floor: min_lr_rate: 0.1 for a tenth of the peak.",
        )
    warms_up_otherwise = str(checked.get("optim", "")).startswith("schedule_free") or any(
        stage.schedule is not None for stage in recipe.data.stages
    )
    if kind == "constant" and checked.get("warmup_steps") and not warms_up_otherwise:
        in_tokens = recipe.run.warmup_tokens is not None
        problems.add(
            "run.warmup_tokens" if in_tokens else "training.warmup_steps",
            "is set but training.lr_scheduler_type is constant, which has no warm-up. Set constant_with_warmup, or "
            "remove it.",
        )


def _check_value(key: str, value: Any, hint: Any, problems: Problems) -> Any:
    accepted, problem = _coerce(value, hint)
    if problem:
        problems.add(key, f"is {value!r} but must be {_describe(hint)}.")
        return value
    name = key.rpartition(".")[2]
    if name in RANGES and isinstance(accepted, int | float) and not isinstance(accepted, bool):
        low, high, with_low, with_high = RANGES[name]
        too_low = accepted < low or (accepted == low and not with_low)
        too_high = high is not None and (accepted > high or (accepted == high and not with_high))
        if math.isnan(accepted) or math.isinf(accepted) or too_low or too_high:
            border = f"{'at least' if with_low else 'above'} {low:g}"
            if high is not None:
                border += f" and {'at most' if with_high else 'below'} {high:g}"
            problems.add(key, f"is {value!r} but must be a finite number {border}.")
    return accepted


def _coerce(value: Any, hint: Any) -> tuple[Any, bool]:
    """The value as one of the hint's types, and whether that failed. No lossy conversion: 1.5 is never an int."""
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else [hint]
    )
    for option in options:
        base = typing.get_origin(option) or option
        if base in (type(None),) and value is None:
            return value, False
        if base is bool and isinstance(value, bool):
            return value, False
        if (
            base is int
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            and value == int(value if math.isfinite(value) else 0)
        ):
            return int(value), False
        if base is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if isinstance(value, float) else value, False
        if base in (list, dict) and isinstance(value, base):
            return value, False
        if (base is str or (isinstance(base, type) and issubclass(base, enum.Enum))) and isinstance(value, str):
            return value, False
        if base is Any:
            return value, False
    return value, True


def _describe(hint: Any) -> str:
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else [hint]
    )
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "a mapping",
    }
    found = []
    for option in options:
        base = typing.get_origin(option) or option
        word = "a text" if isinstance(base, type) and issubclass(base, enum.Enum) else words.get(base)
        if word and word not in found:
            found.append(word)
    return " or ".join(found) or str(hint)


def scheduler_kwargs(checked: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """lr_scheduler_kwargs with fractions resolved: like warmup_steps, num_decay_steps below 1 is a share of the run."""
    kwargs = dict(checked.get("lr_scheduler_kwargs") or {})
    decay = kwargs.get("num_decay_steps")
    if isinstance(decay, float) and 0 < decay < 1:
        kwargs["num_decay_steps"] = math.ceil(decay * num_steps)
    return kwargs


def build_arguments(checked: dict[str, Any], derived: dict[str, Any]) -> Any:
    """The real TrainingArguments: the user's values, our defaults where silent, and what the plan derives.

    Raises:
        ValueError: transformers refuses a combination (its own message).
    """
    from transformers import TrainingArguments

    values = {**DEFAULTS, **checked, **derived}
    accelerator_config = dict(values.get("accelerator_config") or {})
    # With pinned memory the copy to the GPU overlaps the previous step; a blocking copy drains the GPU.
    accelerator_config.setdefault("non_blocking", True)
    values["accelerator_config"] = accelerator_config
    return TrainingArguments(**values)
