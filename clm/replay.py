"""A run's order again, from its folder alone: what each step has trained on or will train on. Needs no torch.

In: runs/<name>/ with recipe.yaml (its `resolved` section) and events.jsonl. Out: `Replay`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clm.events import excluded_ranges
from clm.layout import lay_out, make_order, make_timeline
from clm.order import Order
from clm.recipe import Recipe, load_recipe
from clm.run_folder import read_recipe
from clm.timeline import Timeline
from data_prep.blocks import Blocks
from data_prep.errors import UserError
from data_prep.paths import dataset_folder


@dataclass(frozen=True)
class Replay:
    """A recorded run: its data, order and stages, with everything that was excluded so far."""

    run: Path
    recipe: Recipe
    resolved: dict[str, Any]
    dataset_names: list[str]
    splits: list[Blocks]
    timeline: Timeline
    order: Order

    @property
    def num_processes(self) -> int:
        """That saw rows of their own in the run's latest start; another start may have had another number."""
        return int(self.resolved.get("num_processes") or 1) // int(self.resolved.get("tp_size") or 1)

    @property
    def samples_per_micro_batch(self) -> int:
        """Prepared blocks that one device saw in one forward, at the run's latest start."""
        rows = int(self.recipe.training["per_device_train_batch_size"])
        return rows * self.recipe.data.block_size // self.splits[0].block_size

    def blocks_of_step(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sample, dataset, block) of a step's global batch, in its order; int64 arrays of one length.

        Raises:
            UserError: the run has no such step.
        """
        if not 1 <= step <= self.timeline.num_steps:
            raise UserError(f"{self.run}: has no step {step:,}. Its steps are 1 to {self.timeline.num_steps:,}.")
        samples = self.timeline.samples_of_step(step)
        return samples, *self.order.block_at(samples)


def open_replay(run: Path) -> Replay:
    """Open a run that has begun.

    Raises:
        UserError: its data has moved or changed, or its recipe.yaml is damaged.
    """
    recipe = load_recipe(run / "recipe.yaml")
    recipe.problems.raise_if_any()
    resolved = read_recipe(run)["resolved"]
    recorded = {entry["name"]: entry for entry in resolved.get("datasets") or []}
    splits = []
    for name in recipe.data.datasets:
        entry = recorded.get(name, {})
        split = Blocks(Path(entry.get("folder") or dataset_folder(name)), "train")
        known, now = entry.get("fingerprint"), split.manifest.fingerprint
        if known is not None and known != now:
            raise UserError(
                f"{split.folder}: its content has changed since {run} was trained on it (fingerprint {known[:12]} "
                f"then, {now[:12]} now). What a step saw can no longer be read from it. Restore the data."
            )
        splits.append(split)
    timeline = make_timeline(lay_out(recipe.data, splits, recipe.problems), excluded_ranges(run))
    seed = recipe.training.get("data_seed")
    seed = recipe.training.get("seed", 42) if seed is None else seed
    order = make_order(timeline, splits, int(seed), recipe.data.shuffle)
    return Replay(run, recipe, resolved, list(recipe.data.datasets), splits, timeline, order)
