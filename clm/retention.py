"""Which checkpoints of a run are kept, which are reduced to their weights, and which are deleted.

In: the complete checkpoints and run.retention. Out: a `Choice`, and `apply_retention`, which carries it out.

    {last: 2, best: 1, every_tokens: 1B, weights: all}, a checkpoint every 0.4 B tokens, the lowest loss at 0.8 B:

    tokens   0.4 B     0.8 B   1.2 B            1.6 B     2.0 B                  2.4 B
    becomes  weights   full    full             weights   full                   full
    because            best    first from 1 B             last, first from 2 B   last

The newest checkpoint, the best and the milestones are never deleted; nor is the newest made unfit for a resume while
the run goes on, also with `last: 0`, so that a kill loses no more than the steps since.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from clm.checkpoint import RESUME_ONLY, SAVING, hash_files, publish, read_checkpoint_facts, rolled_back_at, trash
from clm.recipe_sections import Retention
from clm.run_folder import (
    MANIFEST,
    PREFIX,
    WEIGHTS_MANIFEST,
    WEIGHTS_PREFIX,
    list_checkpoints,
    list_weights,
)
from clm.sharded import is_sharded
from data_prep.errors import UserError


@dataclass(frozen=True, order=True)
class Saved:
    """A complete checkpoint: full, or weights only. `eval_loss` is of an evaluation at exactly its step."""

    step: int
    tokens: int
    is_full: bool
    eval_loss: float | None = None


@dataclass
class Choice:
    """What becomes of each checkpoint."""

    keep: set[Saved] = field(default_factory=set)
    reduce: set[Saved] = field(default_factory=set)
    delete: set[Saved] = field(default_factory=set)


def choose(checkpoints: Iterable[Saved], retention: Retention, is_finished: bool = False) -> Choice:
    """Decide about every checkpoint; a pure function, and choosing again among what is left changes nothing.

    Args:
        checkpoints: all that are complete; one step may be there in full and as weights.
        retention: run.retention.
        is_finished: final/ is written, so that the newest need not be resumable any more: with `last: 0` it is reduced
            like the others.
    """
    everything = sorted(checkpoints)
    full = [c for c in everything if c.is_full]
    full_steps = {c.step for c in full}
    each_once = [c for c in everything if c.is_full or c.step not in full_steps]  # of a step, the full one counts
    protected = {*_best(each_once, retention.best), *_milestones(each_once, retention.every_tokens)}
    num_last = retention.last if is_finished else max(retention.last, 1)
    choice = Choice(keep={*protected, *full[max(0, len(full) - num_last) :]})

    rest = [c for c in each_once if c not in choice.keep]
    num_weights = {"none": 0, "all": len(rest)}.get(retention.weights, retention.weights)
    for candidate in reversed(rest):  # the newest first
        if not candidate.is_full and retention.weights == "none":
            choice.keep.add(candidate)  # of an earlier setting: none makes no more of them, and takes none away
        elif num_weights > 0:
            (choice.reduce if candidate.is_full else choice.keep).add(candidate)
            num_weights -= 1
        elif candidate == each_once[-1]:
            choice.keep.add(candidate)
        else:
            choice.delete.add(candidate)
    for twin in set(everything) - set(each_once):  # a kill came between the making of weights and their full one's end
        full_one = next(c for c in full if c.step == twin.step)
        is_wanted = full_one in choice.reduce or (full_one in choice.delete and retention.weights == "none")
        (choice.keep if is_wanted else choice.delete).add(twin)
    return choice


def _best(checkpoints: list[Saved], count: int) -> list[Saved]:
    evaluated = [c for c in checkpoints if c.eval_loss is not None and c.eval_loss == c.eval_loss]
    return sorted(evaluated, key=lambda c: (c.eval_loss, c.step))[:count]


def _milestones(checkpoints: list[Saved], every_tokens: int | None) -> list[Saved]:
    """The first checkpoint at or after each multiple of every_tokens."""
    passed, found = 0, []
    for checkpoint in checkpoints if every_tokens else []:
        if checkpoint.tokens // every_tokens > passed:
            passed = checkpoint.tokens // every_tokens
            found.append(checkpoint)
    return found


def count_kept(retention: Retention, num_saves: int, num_tokens: int) -> tuple[int, int]:
    """How many checkpoints a run of so many saves keeps at most: full ones, and weights only."""
    num_milestones = num_tokens // retention.every_tokens if retention.every_tokens else 0
    full = min(num_saves, max(retention.last, 1) + retention.best + num_milestones)
    wanted = {"none": 0, "all": num_saves}.get(retention.weights, retention.weights)
    return full, min(wanted, num_saves - full)


def apply_retention(run: Path, retention: Retention, step: int, is_finished: bool = False) -> None:
    """Reduce and delete as chosen. A kill at any moment leaves complete folders only, and the next call goes on.

    Checkpoints that trained on what a rollback excluded belong to no run any more and are deleted.

    Args:
        step: where the training is. What lies ahead was damaged, or it would have been resumed from: it neither counts
            nor is it touched before the training has passed it.
    """
    found: dict[Saved, Path] = {}
    for folders, manifest in ((list_checkpoints(run), MANIFEST), (list_weights(run), WEIGHTS_MANIFEST)):
        for number, path in folders:
            try:
                facts = read_checkpoint_facts(path, manifest)
                saved = Saved(number, facts["tokens"], manifest == MANIFEST, facts.get("eval_loss"))
            except (OSError, ValueError, KeyError):
                continue  # damaged: the next start names it; nothing is done to it here
            if rolled_back_at(run, facts) is not None:
                trash(path)
            elif saved.step <= step:
                found[saved] = path
    choice = choose(found, retention, is_finished)
    for saved in sorted(choice.reduce):
        reduce_to_weights(found[saved])
    for saved in sorted(choice.delete):
        trash(found[saved])


def reduce_to_weights(checkpoint: Path) -> Path:
    """Make weights-<step> of checkpoint-<step>: its model, tokenizer, recipe and environment, without a second copy.

    Raises:
        OSError: it cannot be written; the checkpoint is as before.
        UserError: the checkpoint holds no weights that could be kept alone.
    """
    run, name = checkpoint.parent, checkpoint.name.replace(PREFIX, WEIGHTS_PREFIX)
    if not (run / name / WEIGHTS_MANIFEST).is_file():
        facts = read_checkpoint_facts(checkpoint)
        files = {n: f for n, f in facts["files"].items() if not any(fnmatch(n, glob) for glob in RESUME_ONLY)}
        if not is_sharded(checkpoint) and not any(file.endswith(".safetensors") for file in files):
            raise UserError(f"{checkpoint}: holds no *.safetensors to reduce it to, so it is kept in full.")
        temporary = run / SAVING / name
        shutil.rmtree(temporary, ignore_errors=True)
        for file in files:
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            _link(checkpoint / file, temporary / file)
        if is_sharded(checkpoint):
            from clm.unshard import write_weights

            files |= hash_files(temporary, write_weights(checkpoint, temporary))
        about = {name: value for name, value in facts.items() if name not in ("files", "sha256")}
        publish(temporary, run / name, about, files, WEIGHTS_MANIFEST)
    trash(checkpoint)
    return run / name


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())
