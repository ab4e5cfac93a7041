"""`python -m clm explain`: from a point of the curve back to the text, and from a text to the steps that see it.

In: a run and a step, or a block. Out: which process saw which prepared block, the documents in it with their byte
ranges, the text, and under some weights of the run the loss of every token: in the terminal, and as one HTML file that
needs nothing else. The batch of a step is a function of the run's recipe, so nothing has to be recorded for it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clm.block_text import BlockText, mean, read_block
from clm.explain_html import write_html
from clm.explain_text import format_explanation
from clm.replay import Replay, open_replay
from clm.run_folder import find_run, list_checkpoints, list_weights, model_folder, read_metrics, read_recipe
from data_prep.documents import DocumentMap
from data_prep.errors import UserError, did_you_mean
from data_prep.manifest import MANIFEST_NAME
from data_prep.vocabulary import Vocabulary, has_colours

MAX_TOKENS = 2**17  # of text in one report: 5 MB of HTML, which a browser still opens at once
FINAL, NONE = "final", "none"  # words for --checkpoint


@dataclass
class Explanation:
    """Everything that a report shows."""

    title: str
    facts: list[tuple[str, str]]
    notes: list[str]  # whole sentences
    block_size: int  # T, tokens of a row
    blocks: list[BlockText]  # those with text; the first of `num_blocks`
    num_blocks: int
    vocabulary: Vocabulary


class RunText:
    """A run's prepared data as text.

    Raises:
        UserError: a dataset is not where the run found it, or has other content.
    """

    def __init__(self, replay: Replay):
        self.replay = replay
        self.newest = newest_step(replay.run)
        self.vocabulary = Vocabulary(replay.splits[0].folder)
        folders = [Path(name).name if Path(name).is_absolute() else name for name in replay.dataset_names]
        self.names = folders if len(set(folders)) == len(folders) else replay.dataset_names
        self.notes: list[str] = []
        self.documents: list[DocumentMap | None] = []
        for split in replay.splits:
            try:
                self.documents.append(DocumentMap(split.folder, split.split))
            except UserError as error:
                self.documents.append(None)
                self.notes.append(f"Without documents: {error}")
        self.notes += self.vocabulary.differences

    def read(self, dataset: int, block: int) -> BlockText:
        """One block of one dataset of the run."""
        split, documents = self.replay.splits[dataset], self.documents[dataset]
        return read_block(split, documents, self.names[dataset], block, self.vocabulary.lengths)

    def place_of(self, sample: int, step: int) -> dict[str, int]:
        """Which process saw a sample of a step, in which of its micro-batches, as recipe.yaml records the layout."""
        within = sample - int(self.replay.timeline.samples_of_step(step)[0])
        micro_batch = within // self.replay.samples_per_micro_batch
        return {
            "sample": sample,
            "rank": micro_batch % self.replay.num_processes,
            "micro_batch": micro_batch // self.replay.num_processes,
        }

    def steps_of(self, dataset: int, block: int) -> list[tuple[int, int | None]]:
        """(sample, step) of every time that the run trains on a block; step None where a rollback took it out."""
        timeline = self.replay.timeline
        samples = self.replay.order.samples_of(dataset, block, timeline.num_samples)
        return [(sample, timeline.step_of_sample(sample)) for sample in samples]

    def describe_steps(self, dataset: int, block: int) -> list[str]:
        """At which steps a block was seen and will be, each as words; excluded samples are named as such."""
        out = []
        for sample, step in self.steps_of(dataset, block):
            if step is None:
                out.append(f"excluded by a rollback (sample {sample:,})")
                continue
            place = self.place_of(sample, step)
            when = "seen" if step <= self.newest else "will be seen"
            out.append(f"{when} at step {step:,} (rank {place['rank']}, micro-batch {place['micro_batch']})")
        return out or [f"not in the {self.replay.timeline.num_steps:,} steps of this run"]

    def split_at(self, text: str) -> tuple[int, int]:
        """DATASET:N of the command line as (dataset, block).

        Raises:
            UserError: no such dataset in the run, or no such block in it.
        """
        name, _, number = text.rpartition(":")
        names = self.replay.dataset_names if name in self.replay.dataset_names else self.names
        if name not in names:
            raise UserError(f"--block is {text} but this run has no dataset {name!r}. {did_you_mean(name, names)}")
        dataset = names.index(name)
        num_blocks = self.replay.splits[dataset].num_blocks
        if not number.isdecimal() or int(number) >= num_blocks:
            raise UserError(
                f"--block is {text} but {self.replay.splits[dataset].folder} has the blocks 0 to {num_blocks - 1:,}. "
                f"Write for example --block {name}:{num_blocks - 1}."
            )
        return dataset, int(number)


def open_text(run: Path) -> RunText:
    """The text of a run.

    Raises:
        UserError: its data is not where it was, or has other content.
    """
    for entry in read_recipe(run)["resolved"].get("datasets") or []:
        folder = Path(entry["folder"])
        if not (folder / MANIFEST_NAME).is_file():
            raise UserError(
                f"{folder}: this run was trained on it, and no prepared dataset is there now. Its text cannot be read. "
                f"Put it back (a symbolic link does), or prepare it as before: make prep RECIPE={run / 'recipe.yaml'}"
            )
    return RunText(open_replay(run))


def explain_step(text: RunText, step: int, weights: Path | None) -> Explanation:
    """The batch of a step.

    Args:
        weights: folder of a model in Hub format; None for no losses.
    Raises:
        UserError: the run has no such step.
    """
    replay, timeline = text.replay, text.replay.timeline
    if step > timeline.num_steps:
        raise UserError(
            f"{replay.run / 'recipe.yaml'}: the run has {timeline.num_steps:,} steps but --step is {step:,}. "
            f"Name one of 1 to {timeline.num_steps:,}."
        )
    stage = timeline.stage_of_step(step)
    samples, datasets, numbers = replay.blocks_of_step(step)
    shown = samples[: _most_blocks(replay)]
    blocks = [text.read(int(d), int(b)) for d, b in zip(datasets[: len(shown)], numbers[: len(shown)], strict=True)]
    for block, sample in zip(blocks, shown.tolist(), strict=True):
        block.seen_as = text.place_of(sample, step)
    per_micro_batch = replay.samples_per_micro_batch
    num_micro_batches = len(samples) // per_micro_batch // replay.num_processes
    rows = per_micro_batch * replay.splits[0].block_size // stage.block_size
    layout = (
        f"{_count(replay.num_processes, 'process', 'es')} x {_count(num_micro_batches, 'micro-batch', 'es')} x "
        f"{_count(rows, 'row')} of {stage.block_size:,} tokens, as at the last start of the run"
    )
    name = f", stage {stage.name!r} ({stage.index + 1} of {len(timeline.stages)})" if len(timeline.stages) > 1 else ""
    seen = "seen" if step <= text.newest else f"will be seen, the run is at step {text.newest:,}"
    facts = [
        ("step", f"{step:,} of {timeline.num_steps:,}{name}: {seen}"),
        ("tokens", f"{stage.tokens_per_step:,} in it, {timeline.tokens_before(step - 1):,} before it"),
        ("layout", layout),
    ]
    logged = next((r["loss"] for r in read_metrics(replay.run) if r.get("step") == step and "loss" in r), None)
    if logged is not None:
        facts.append(("loss in metrics.jsonl", f"{logged:.4f}, the mean since the log point before"))
    explanation = Explanation(
        f"{replay.run.name}, step {step:,}", facts, list(text.notes), stage.block_size, blocks, len(samples),
        text.vocabulary,
    )  # fmt: skip
    _note_excluded(explanation, replay)
    _add_losses(explanation, replay, weights, step)
    return explanation


def explain_block(text: RunText, dataset: int, number: int, weights: Path | None) -> Explanation:
    """One prepared block, whenever it is seen."""
    replay = text.replay
    block, steps = text.read(dataset, number), text.describe_steps(dataset, number)
    facts = [("block", f"{block.dataset}:{number:,}")]
    facts += [("" if i else "steps", sentence) for i, sentence in enumerate(steps)]
    size = replay.timeline.stages[-1].block_size
    explanation = Explanation(
        f"{replay.run.name}, block {block.dataset}:{number:,}", facts, list(text.notes), size, [block], 1,
        text.vocabulary,
    )  # fmt: skip
    _add_losses(explanation, replay, weights, None)
    return explanation


def choose_weights(run: Path, step: int | None, asked: str | None) -> tuple[Path | None, list[str]]:
    """The folder of the weights to compute losses with, and a sentence where there is none.

    Args:
        step: the newest checkpoint at or before it is taken; None: the final model, else the newest checkpoint.
        asked: --checkpoint: a step, final or none; None for the default.
    Raises:
        UserError: what was asked for does not exist.
    """
    if asked == NONE:
        return None, []
    if asked == FINAL:
        return model_folder(run), []
    if asked is not None:
        if not asked.isdecimal():
            raise UserError(f"--checkpoint is {asked!r} but must be a step, {FINAL} or {NONE}.")
        return model_folder(run, int(asked)), []
    made = sorted({each for each, _ in [*list_checkpoints(run), *list_weights(run)]}, reverse=True)
    candidates = [None, *made] if step is None else [*(each for each in made if each <= step), None]
    for candidate in candidates:
        try:
            return model_folder(run, candidate), []
        except UserError:
            continue  # not there, or only the shards of one
    before = "" if step is None else f" at or before step {step:,}"
    return None, [f"No losses: the run has no checkpoint{before} and no final model yet."]


def newest_step(run: Path) -> int:
    """The newest step that the run is known to have trained: by metrics.jsonl, or by a checkpoint."""
    steps = [record.get("step", 0) for record in read_metrics(run)]
    return max([0, *steps, *(step for step, _ in [*list_checkpoints(run), *list_weights(run)])])


def write_step_report(run: Path, step: int, folder: Path, checkpoint: Path | None = None) -> Explanation:
    """Write a step's batch as `folder`/text.html and text.txt; without a checkpoint no model is loaded.

    The batch is the one that the run's events give to the step now: called before a rollback of this step is recorded,
    it is the batch that was trained on.
    """
    explanation = explain_step(open_text(run), step, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    write_html(explanation, folder / "text.html")
    (folder / "text.txt").write_text(format_explanation(explanation) + "\n", encoding="utf-8")
    return explanation


def print_explanation(
    name: str, step: int | None, block: str | None, checkpoint: str | None, max_rows: int, out: str | None
) -> None:
    """`python -m clm explain RUN --step N` and `--block DATASET:N`: print the text and write the HTML file."""
    text = open_text(find_run(name))
    replay = text.replay
    weights, notes = choose_weights(replay.run, step, checkpoint)
    text.notes += notes
    if step is not None:
        explanation, file = explain_step(text, step, weights), f"step-{step}.html"
    else:
        dataset, number = text.split_at(block)
        explanation = explain_block(text, dataset, number, weights)
        file = f"block-{explanation.blocks[0].dataset.replace('/', '-')}-{number}.html"
    print(format_explanation(explanation, max_rows, has_colours(sys.stdout)))
    path = Path(out) if out else replay.run / "explain" / file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_html(explanation, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}). Name another file with --out.") from error
    print(f"\nHTML: {path}")


def _most_blocks(replay: Replay) -> int:
    return max(1, MAX_TOKENS // replay.splits[0].block_size)


def _note_excluded(explanation: Explanation, replay: Replay) -> None:
    if replay.timeline.excluded:
        num = sum(end - first for first, end in replay.timeline.excluded)
        explanation.notes.append(
            f"Rollbacks took {num:,} samples out of this run; they are passed over here as in training."
        )


def _add_losses(explanation: Explanation, replay: Replay, weights: Path | None, step: int | None) -> None:
    """Compute the losses of all blocks shown, and say under which weights."""
    if weights is None:
        return
    if replay.recipe.data.permute_labels:
        explanation.notes.append("No losses: data.permute_labels is true, so a target is no token of the text.")
        return
    from tqdm import tqdm

    from clm.token_loss import iter_losses, load_weights

    blocks = explanation.blocks
    masked_at = explanation.vocabulary.eos_token_id if replay.recipe.data.document_mask else None
    losses = iter_losses(
        load_weights(weights), np.stack([block.tokens for block in blocks]), explanation.block_size, masked_at
    )
    for block, each in zip(blocks, tqdm(losses, "losses", len(blocks), leave=False, disable=None), strict=True):
        block.losses = each
    every = np.concatenate([block.losses for block in blocks])
    value = mean(every)
    if math.isfinite(value):
        num, made_by = int(np.count_nonzero(~np.isnan(every))), _describe(weights, step, replay)
        shown = f"{value:.4f} nats on average over {num:,} targets, under {made_by}; fp32, no dropout"
        explanation.facts.append(("losses", shown))


def _describe(weights: Path, step: int | None, replay: Replay) -> str:
    """The name of the weights, and how many steps before or after a step they were made."""
    made = str(replay.timeline.num_steps) if weights.name == FINAL else weights.name.rpartition("-")[2]
    if step is None or not made.isdecimal():
        return weights.name
    after = int(made) - step
    if after == 0:
        return f"{weights.name}, made by this step"
    return f"{weights.name}, {_count(abs(after), 'step')} {'later' if after > 0 else 'before it'}"


def _count(number: int, thing: str, plural: str = "s") -> str:
    return f"{number:,} {thing}{plural if number != 1 else ''}"
