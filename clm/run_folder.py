"""Reading a run: runs/<name>/ with recipe.yaml, metrics.jsonl, checkpoint-<step>/ and final/.

In: a run's name or path. Out: its parts, or a UserError that says what is missing and which command makes it.
Nothing here writes, and nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from clm.recipe_yaml import YamlProblem, load_yaml
from data_prep.errors import UserError, nearest
from data_prep.paths import runs_dir

PREFIX, MANIFEST = "checkpoint-", "checkpoint.json"  # resumable; its manifest is written last
EMA = "ema"  # in a checkpoint: its averaged weights (clm/ema.py)
WEIGHTS_PREFIX, WEIGHTS_MANIFEST = "weights-", "weights.json"  # a checkpoint that was reduced to its weights


def run_path(name_or_path: str | Path) -> Path:
    """Where a run lies, or will: a bare name under runs_dir(), anything with a separator is a path."""
    text = str(name_or_path)
    is_path = "/" in text or os.sep in text or text in (".", "..")
    return Path(text) if is_path else runs_dir() / text


def find_run(name_or_path: str | Path) -> Path:
    """The folder of a run (`run_path`), which has to be there.

    Raises:
        UserError: no such run; names the nearest ones and the command that makes one.
    """
    run = run_path(name_or_path)
    if (run / "recipe.yaml").is_file():
        return run
    beside = run.parent
    names = sorted(path.parent.name for path in beside.glob("*/recipe.yaml"))
    near = nearest(run.name, names)
    if near:
        hint = f"Did you mean {' or '.join(str(beside / name) for name in near)}?"
    elif names:
        hint = f"Runs there: {', '.join(names)}."
    else:
        hint = f"There is no run in {beside} yet."
    recipe = Path("recipes") / f"{run.name}.yaml"
    recipe = recipe if recipe.is_file() else "recipes/x.yaml"
    make = "make demo" if run.name == "demo" else f"make train RECIPE={recipe}"
    what = "holds no recipe.yaml, so it is not a run" if run.is_dir() else "this run does not exist"
    raise UserError(f"{run}: {what}. {hint} A run is made by: {make}")


def read_recipe(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run, with its `resolved` section (an empty one if the run never got that far)."""
    try:
        recipe, _ = load_yaml(run / "recipe.yaml")
    except YamlProblem as error:
        raise UserError(str(error)) from None
    return {"resolved": {}, **recipe}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All objects of metrics.jsonl."""
    return read_json_lines(run / "metrics.jsonl")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All objects of a .jsonl file, [] for none; a last line that a kill tore in two is left out.

    Raises:
        UserError: a line that is not the last is no JSON object.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError:
            if number == len(lines):
                break
            raise UserError(
                f"{path}: line {number} is not a JSON object. The lines after it may be of another run. "
                f"Look at it with: sed -n {number}p {path}"
            ) from None
        records.append(record)
    return records


def last_evaluation(metrics: list[dict[str, Any]], is_ema: bool = False) -> dict[str, Any] | None:
    """The newest evaluation among the objects of metrics.jsonl, or None.

    Args:
        is_ema: of the averaged weights (run.ema), under the names of the weights' own.
    """
    found = next((record for record in reversed(metrics) if "eval_loss" in record), None)
    if not is_ema or found is None:
        return found
    return found | {k.replace("eval_ema_", "eval_"): v for k, v in found.items() if k.startswith("eval_ema_")}


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints as (step, folder), by step number: checkpoint-1000 comes after checkpoint-200.

    Complete means that checkpoint.json, which is written last, is there.
    """
    return _list_folders(run, PREFIX, MANIFEST)


def list_weights(run: Path) -> list[tuple[int, Path]]:
    """The weights-only checkpoints as (step, folder), by step number."""
    return _list_folders(run, WEIGHTS_PREFIX, WEIGHTS_MANIFEST)


def _list_folders(run: Path, prefix: str, manifest: str) -> list[tuple[int, Path]]:
    found = []
    for path in run.glob(f"{prefix}*"):
        match = re.fullmatch(rf"{prefix}(\d+)", path.name)
        if match and (path / manifest).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def model_folder(run: Path, checkpoint: int | None = None, is_ema: bool = False) -> Path:
    """The folder to load the model from: final/, or one checkpoint, which may hold weights only.

    Args:
        is_ema: the averaged weights of run.ema: final-ema/, or ema/ in the checkpoint.
    Raises:
        UserError: it does not exist; says what does, and how to use it.
    """
    folders = {**dict(list_weights(run)), **dict(list_checkpoints(run))}
    steps = sorted(folders)
    if checkpoint is not None:
        folder = folders.get(checkpoint, run / f"{PREFIX}{checkpoint}")
        if checkpoint not in steps:
            there = f"Complete checkpoints: {', '.join(map(str, steps))}." if steps else "It has no complete one yet."
            raise UserError(f"{folder}: this run has no complete checkpoint of step {checkpoint}. {there}")
    else:
        folder = run / "final"
        if not (folder / "config.json").is_file():
            if steps:
                remedy = f"The newest checkpoint is of step {steps[-1]}; use it with: --checkpoint {steps[-1]}"
            else:
                remedy = (
                    "It has no checkpoint yet either. Wait for one, or train again with the same recipe to continue."
                )
            raise UserError(f"{folder}: does not exist, because the run has not finished. {remedy}")
    if is_ema:
        folder = folder / EMA if checkpoint is not None else run / "final-ema"
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: does not exist, because the run was made without run.ema. Leave out --ema.")
    if (folder / "sharded").is_dir():  # of FSDP2
        from clm.unshard import model_of_shards

        folder = model_of_shards(folder)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder}: holds no *.safetensors, so it cannot be loaded as a model. Use final/, or another checkpoint."
        )
    return folder


def tokenizer_folder(run: Path, folder: Path) -> Path:
    """Where the tokenizer of a model folder lies: in it, else with the first dataset that the run was trained on."""
    datasets = read_recipe(run)["resolved"].get("datasets") or []
    candidates = [folder, *(Path(dataset["folder"]) / "tokenizer" for dataset in datasets)]
    for candidate in candidates:
        if (candidate / "tokenizer_config.json").is_file():
            return candidate
    raise UserError(f"{folder}: no tokenizer found, neither there nor in {', '.join(map(str, candidates[1:]))}.")
