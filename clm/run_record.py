"""The run's own record: runs/<name>/recipe.yaml, and whether a run folder belongs to the recipe at hand.

In: a plan or a recipe. Out: recipe.yaml with a `resolved:` section, written by rename; or a UserError with the
differences when the folder was made by another recipe or from other data.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from clm.arguments import check_training
from clm.events import append_event
from clm.recipe import Recipe, load_recipe
from data_prep.errors import UserError
from data_prep.paths import dataset_folder, runs_dir

RECORD = "recipe.yaml"

# What may change between two starts of one run, because it changes neither the data, the weights nor the schedule.
FREE_KEYS = {
    "model.attention",
    "run.speed",
    "run.loss",
    "run.peak_tflops",
    "data.validation",
    "data.max_epochs",
    "data.tokenizer",  # what prep uses; the prepared data is compared by its fingerprint
    "run.samples",
    "run.retention",
    "run.spikes",
    "run.preflight",
    "run.full_disk",
    "run.save_in_background",
    "run.record_blocks",
    "run.uneven_batch",
}
FREE_TRAINING_KEYS = {
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "logging_steps",
    "logging_first_step",
    "eval_steps",
    "eval_strategy",
    "eval_delay",
    "save_steps",
    "save_strategy",
    "report_to",
    "disable_tqdm",
    "use_cpu",
    "ddp_backend",
    "ddp_timeout",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "deepspeed",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "torch_empty_cache_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "save_on_each_node",
    "skip_memory_metrics",
    "project",
    "run_name",
    "accelerator_config",
}
FREE_PREFIXES = ("dataloader_", "hub_", "push_to_hub", "trackio_")


def is_finished(recipe: Recipe, allow_changes: bool = False) -> bool:
    """Whether runs/<name>/final exists, which is written last; needs no torch.

    Raises:
        UserError: the recipe has a mistake, or the run folder belongs to another recipe and that is not allowed.
    """
    run = runs_dir() / recipe.name
    changes = recipe_changes(recipe, run)
    if changes and not allow_changes:
        check_training(recipe)  # a misspelt key is a difference too, but not what the user needs to hear
        recipe.problems.raise_if_any()
        raise UserError(
            f"{run} belongs to another recipe:\n"
            + "\n".join(f"  {change}" for change in changes)
            + "\nNothing was changed. Give this run its own folder with "
            f"training.run_name={recipe.name}-2, or put the values back, or, if the run is to go on with the new ones "
            "from its newest checkpoint, add --allow-changes. To train longer: make extend."
        )
    return (run / "final").is_dir()


def recipe_changes(recipe: Recipe, run: Path) -> list[str]:
    """Every key with both values in which a recipe differs from the one that the run folder was made by."""
    record = run / RECORD
    if not record.is_file():
        return []
    before = _flatten(load_recipe(record).to_dict())
    now = _flatten(recipe.to_dict())
    missing = object()
    return [
        f"{key}: {before.get(key, 'not set')!r} in the run, {now.get(key, 'not set')!r} in {recipe.path}"
        for key in sorted({*before, *now})
        if before.get(key, missing) != now.get(key, missing) and not _may_change(key)
    ]


def identity(recipe: Recipe, fingerprints: dict[str, str]) -> str:
    """SHA-256 of what makes a run what it is: every key that may not change between two starts, and the data."""
    fixed = {key: value for key, value in _flatten(recipe.to_dict()).items() if not _may_change(key)}
    text = json.dumps({"recipe": fixed, "data": fingerprints}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def data_changes(plan: Any) -> list[str]:
    """Every dataset with both fingerprints that was prepared anew with another content since the run began."""
    record = plan.run_folder / RECORD
    if not record.is_file():
        return []
    resolved = (yaml.safe_load(record.read_text(encoding="utf-8")) or {}).get("resolved") or {}
    before = {entry["name"]: entry["fingerprint"] for entry in resolved.get("datasets", [])}
    return [
        f"{dataset_folder(name)}: fingerprint {before[name][:12]} in the run, {now[:12]} now"
        for name, now in plan.fingerprints.items()
        if before.get(name, now) != now
    ]


def check_same_data(plan: Any, allow_changes: bool = False) -> None:
    """Refuse to continue on other data unless that is allowed.

    Raises:
        UserError: names the dataset and both fingerprints.
    """
    changes = data_changes(plan)
    if changes and not allow_changes:
        raise UserError(
            f"the data has changed since {plan.run_folder} began:\n"
            + "\n".join(f"  {change}" for change in changes)
            + "\nGoing on would mix two corpora in one curve. Restore the data, or start a new run with "
            f"training.run_name={plan.recipe.name}-2, or add --allow-changes to go on all the same."
        )


def note_changes(plan: Any) -> list[str]:
    """Write allowed changes of recipe and data into events.jsonl, once; returns them."""
    changes = recipe_changes(plan.recipe, plan.run_folder) + data_changes(plan)
    if changes:
        append_event(plan.run_folder, {"event": "changed", "changes": changes})
    return changes


def write_record(plan: Any) -> None:
    """Write runs/<name>/recipe.yaml: the recipe with every default written out, and what was resolved."""
    document = {**plan.recipe.to_dict(), "resolved": resolve(plan)}
    path = plan.run_folder / RECORD
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
    os.replace(temporary, path)


def resolve(plan: Any) -> dict[str, Any]:
    """The `resolved:` section."""
    timeline, names = plan.timeline, list(plan.recipe.data.datasets)
    counts = plan.order.counts_before(timeline.num_samples)
    passes = plan.order.passes(timeline.num_samples)
    return {
        "num_processes": plan.num_processes,
        "tp_size": plan.tp_size,
        "num_steps": plan.num_steps,
        "num_tokens": timeline.num_tokens,
        "stages": [
            {
                "name": stage.name,
                "num_steps": stage.num_steps,
                "num_tokens": stage.num_tokens,
                "block_size": stage.block_size,
                "tokens_per_step": stage.tokens_per_step,
                "gradient_accumulation_steps": plan.accumulation(stage),
                "shares": {n: float(s) for n, s in zip(names, stage.shares, strict=True) if s},
            }
            for stage in timeline.stages
        ],
        "num_parameters": plan.num_parameters,
        "precision": plan.precision,
        "attention": plan.attention,
        "speed": plan.speed.describe(),
        "device": _describe_device(plan),
        "versions": versions(),
        "git_commit": _git_commit(),
        "datasets": [
            {
                "name": name,
                "folder": str(split.folder),
                "fingerprint": split.manifest.fingerprint,
                "num_tokens": split.num_tokens,
                "weight": count / timeline.num_samples,
                "passes": times,
                "licence": split.manifest.licence,
                **({"padding_fraction": split.padding_fraction} if split.is_padded else {}),
            }
            for name, split, count, times in zip(names, plan.splits, counts, passes, strict=True)
        ],
        "validation": [rows.describe() for rows in plan.validation],
        "init": plan.recipe.model.init,
    }


def versions() -> dict[str, str]:
    """What a run was made with."""
    packages = ("torch", "transformers", "accelerate", "tokenizers", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _describe_device(plan: Any) -> str:
    import torch

    if torch.cuda.is_available() and not plan.training.get("use_cpu"):
        return f"{plan.num_processes} x {torch.cuda.get_device_name()}"
    return f"{plan.num_processes} x CPU, {torch.get_num_threads()} threads"


def _git_commit() -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _may_change(key: str) -> bool:
    section, _, name = key.partition(".")
    if section == "training":
        return name.split(".")[0] in FREE_TRAINING_KEYS or name.startswith(FREE_PREFIXES)
    return any(key == free or key.startswith((f"{free}.", f"{free}[")) for free in FREE_KEYS)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            k: v
            for name, child in value.items()
            for k, v in _flatten(child, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {k: v for i, child in enumerate(value) for k, v in _flatten(child, f"{prefix}[{i}]").items()}
    return {prefix: value}
