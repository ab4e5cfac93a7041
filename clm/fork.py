"""A run made longer, or a finished model forked off a run that goes on.

`extend` changes the length that a run's own recipe.yaml says; `anneal` makes a new run whose first stages are the trunk
up to a checkpoint and whose last stage cools down. Both only prepare the folder and say what the learning rate will do:
training is started as always, and goes on from the checkpoint by the resume path.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import yaml

from clm.checkpoint import find_damage, flush_folder, read_checkpoint_facts
from clm.events import append_event, read_events
from clm.metrics import cut_back
from clm.recipe import Recipe, load_recipe
from clm.recipe_readers import read_mixture
from clm.run_folder import EMA, find_run, list_checkpoints
from data_prep.errors import UserError
from data_prep.lock import folder_lock
from data_prep.paths import runs_dir


def extend_run(name: str, num_tokens: int, from_step: int | None) -> str:
    """Give a run another length; returns what was done and how the learning rate changes.

    Args:
        name: of the run.
        num_tokens: the new length of the whole run.
        from_step: go on from this checkpoint instead of the newest one; newer ones are put aside.
    Raises:
        UserError: no checkpoint, fewer tokens than are trained already, or a length that follows from the mixture.
    """
    run = find_run(name)
    checkpoints = dict(list_checkpoints(run))
    if not checkpoints:
        raise UserError(f"{run}: has no complete checkpoint to go on from. Train it first.")
    step = max(checkpoints) if from_step is None else from_step
    if step not in checkpoints:
        raise UserError(f"{run}: has no checkpoint of step {step}. It has {', '.join(map(str, sorted(checkpoints)))}.")
    with folder_lock(run, "is training it", "another run"):
        before = _plan(run / "recipe.yaml")
        document = _document(run)
        data = document["data"]
        if data.get("stages"):
            earlier = sum(stage.num_tokens for stage in before.timeline.stages[:-1])
            last = data["stages"][-1]
            has_amounts = "tokens" not in last
            last["tokens"] = num_tokens - earlier
        else:
            has_amounts = data.get("tokens") is None
            data["tokens"] = num_tokens
        if has_amounts:
            raise UserError(
                f"{run}: its length follows from the amounts of its mixture. Raise tokens or epochs in the recipe, and "
                "start it with --allow-changes."
            )
        trained = before.timeline.tokens_before(min(step, before.num_steps))
        if num_tokens <= trained:
            raise UserError(
                f"{run}: --tokens is {num_tokens:,} but checkpoint-{step} has trained on {trained:,} already. It is "
                "the length of the whole run; give a larger one."
            )
        proposal = run / "recipe.extended.yaml"
        _write_recipe(document, proposal)
        try:
            after = _plan(proposal)
        finally:
            proposal.unlink(missing_ok=True)
        _put_aside(run, step)
        _write_recipe(document, run / "recipe.yaml")
        change = {"from_tokens": before.timeline.num_tokens, "to_tokens": after.timeline.num_tokens, "step": step}
        append_event(run, {"event": "extended", **change})
    return (
        f"{run}: {before.timeline.num_tokens:,} -> {after.timeline.num_tokens:,} tokens, {before.num_steps:,} -> "
        f"{after.num_steps:,} steps, from checkpoint-{step}\n{_compare_rates(before, after, step)}\n"
        f"Start it with: make train RECIPE={shlex.quote(str(run / 'recipe.yaml'))}"
    )


def anneal_run(checkpoint: str, num_tokens: int, mixture: str | None, name: str | None) -> str:
    """Fork a run: the trunk up to a checkpoint, then a stage that cools the learning rate down to 0 (1 - sqrt).

    Args:
        checkpoint: runs/<trunk>/checkpoint-<step>; the trunk may go on training meanwhile.
        num_tokens: length of the last stage.
        mixture: its data: a dataset's name, or a list as in data.mixture; None: the trunk's.
        name: of the new run; default <trunk>-anneal-<step>.
    Raises:
        UserError: no such checkpoint, a damaged one, or a run of that name exists.
    """
    source = Path(checkpoint)
    trunk = find_run(source.parent if str(source.parent) != "." else source)
    known = {path.name: step for step, path in list_checkpoints(trunk)}
    if source.name not in known:
        there = ", ".join(sorted(known, key=lambda n: known[n])) or "none"
        raise UserError(f"{source}: is no complete checkpoint. {trunk} has: {there}.")
    step = known[source.name]
    damage = find_damage(source)
    if damage:
        raise UserError(f"{source}: {damage}. Take another checkpoint.")
    run = runs_dir() / (name or f"{trunk.resolve().name}-anneal-{step}")
    if run.exists():
        raise UserError(f"{run}: exists already. Give the new run another name with --name, or train it on.")
    before = _plan(trunk / "recipe.yaml")
    document = _annealed(before, _document(trunk), step, num_tokens, mixture)
    run.mkdir(parents=True)
    try:
        _write_recipe(document, run / "recipe.yaml")
        after = _plan(run / "recipe.yaml")
        _copy_trunk(trunk, run, source, step)
    except BaseException:
        shutil.rmtree(run)
        raise
    sha256 = _hash_of_weights(read_checkpoint_facts(source)["files"])
    lineage = {"step": step, "tokens": before.timeline.tokens_before(step), "weights_sha256": sha256}
    append_event(run, {"event": "forked", "from": str(trunk), **lineage})
    append_event(trunk, {"event": "fork", "to": str(run), **lineage})
    factor = before.learning_rate_factor()
    falling = (
        ""
        if factor(step) == factor(step - 1)
        else (f"\nThe learning rate of {trunk} is not constant at step {step:,}: the fork begins on a moving curve.")
    )
    return (
        f"{run}: {source} and {num_tokens:,} tokens more\n{_compare_rates(before, after, step)}{falling}\n"
        f"Start it with: make train RECIPE={shlex.quote(str(run / 'recipe.yaml'))}"
    )


def _hash_of_weights(files: dict[str, dict[str, Any]]) -> str:
    """The SHA-256 of model.safetensors; of several files, shards included, that of the list of theirs."""
    own = [name for name in sorted(files) if not name.startswith(f"{EMA}/")]
    names = [name for name in own if name.endswith(".safetensors") or name.startswith("sharded/")]
    sums = [files[name]["sha256"] for name in names]
    return sums[0] if len(sums) == 1 else hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _plan(path: Path) -> Any:
    """The plan of a recipe for one process: what it is needed for here does not depend on their number."""
    from clm.plan import make_plan

    return make_plan(load_recipe(path), num_processes=1)


def _document(run: Path) -> dict[str, Any]:
    return load_recipe(run / "recipe.yaml").to_dict()


def _write_recipe(document: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
    os.replace(temporary, path)


def _put_aside(run: Path, step: int) -> None:
    """Move final/, final-ema/ and the checkpoints after `step` out of the way; nothing is deleted."""
    aside = run / f"before-extension-{len(list(run.glob('before-extension-*'))) + 1}"
    newer = [path for number, path in list_checkpoints(run) if number > step]
    for path in [p for p in (run / "final", run / "final-ema") if p.exists()] + newer:
        aside.mkdir(exist_ok=True)
        os.rename(path, aside / path.name)
    if aside.exists():
        shutil.copyfile(run / "metrics.jsonl", aside / "metrics.jsonl")
        flush_folder(run)


def _annealed(before: Any, document: dict[str, Any], step: int, num_tokens: int, mixture: str | None) -> dict[str, Any]:
    """The trunk's recipe with its stages cut at `step` and one more."""
    recipe: Recipe = before.recipe
    data, names = document["data"], list(recipe.data.datasets)
    stages = []
    for stage, item in zip(before.timeline.stages, data["stages"] or [{"name": "trunk"}], strict=True):
        if stage.first_step >= step:
            break
        num_steps = min(step, stage.last_step) - stage.first_step
        shares = [{"dataset": n, "weight": float(s)} for n, s in zip(names, stage.shares, strict=True) if s]
        own = item.get("mixture") or data["mixture"]
        if any(
            "weight" not in entry for entry in own
        ):  # amounts say a length too, which is no longer that of the stage
            own = shares
        stages.append({**item, "mixture": own, "tokens": num_steps * stage.tokens_per_step})
    last = {"name": "anneal", "tokens": num_tokens, "schedule": {"shape": "1-sqrt", "end": 0.0}}
    for key in ("block_size", "tokens_per_step", "rope"):  # the fork begins as the trunk is at this step
        if key in stages[-1]:
            last[key] = stages[-1][key]
    last["mixture"] = stages[-1]["mixture"] if mixture is None else _mixture(mixture)
    data.update(tokens=None, mixture=[], stages=[*stages, last])
    data["block_size"] = last.get("block_size", data["block_size"])
    document["run"]["schedule_tokens"] = recipe.run.schedule_tokens or before.timeline.num_tokens
    document["training"].pop("run_name", None)
    return {key: _without_empty(value) for key, value in document.items()}


def _mixture(text: str) -> list[dict[str, Any]]:
    from clm.problems import Problems

    value = yaml.safe_load(text)
    value = [{"dataset": value}] if isinstance(value, str) else value
    problems = Problems("command line", {})
    read_mixture(value, "--data", problems)
    problems.raise_if_any()
    return value


def _without_empty(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is not None and value != []}


def _copy_trunk(trunk: Path, run: Path, checkpoint: Path, step: int) -> None:
    """The checkpoint, by hard links where the disk can, and the curve and the events up to it."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    temporary = run / ".saving" / checkpoint.name
    shutil.copytree(checkpoint, temporary, copy_function=link)
    os.rename(temporary, run / checkpoint.name)
    temporary.parent.rmdir()
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (trunk / name).is_file():
            shutil.copyfile(trunk / name, run / name)
            cut_back(run / name, step)
    for event in read_events(trunk):
        if event["event"] == "rollback" and event["last_step"] <= step:
            append_event(run, event)


def _compare_rates(before: Any, after: Any, step: int) -> str:
    """The learning rate before and after the change, at the steps where it matters."""
    peak, old, new = before.training["learning_rate"], before.learning_rate_factor(), after.learning_rate_factor()
    left = after.num_steps - step
    marks = sorted({0, step // 2, step - 1, step, step + left // 4, step + left // 2, after.num_steps - 1})
    lines = ["  after step    until now      now"]
    for k in marks:
        was = f"{peak * old(k):.4g}" if k < before.num_steps else "-"
        lines.append(f"  {k:>10,}    {was:>9}    {peak * new(k):>9.4g}")
    used, will_be = peak * old(min(step, before.num_steps) - 1), peak * new(step)
    if abs(will_be - used) > 0.05 * peak:
        lines.append(
            f"The learning rate jumps from {used:.4g} to {will_be:.4g} at step {step + 1:,}, because the schedule is "
            "stretched. With warmup_stable_decay and a checkpoint before the decay it does not."
        )
    return "\n".join(lines)
