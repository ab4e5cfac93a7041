"""Prepared blocks -> micro-batches.

In: sample numbers (from the sampler) or rows of a validation split. Out: {"input_ids", "labels", "shift_labels"}; with
document masking also what keeps the documents of a row apart (clm/document_mask.py). For the loss-only forward
{"tokens"}, from which the device makes input_ids and shift_labels.

    block of 8 tokens [a b c d e f g h], next row starts with i, trained at T = 4:
        input_ids     a b c d | e f g h
        shift_labels  b c d e | f g h i        every position is trained; -100 only at a shard's last position

    packed block of 8 tokens [a b c d e . . .], of length 5, the rest padding:
        input_ids     a b c d e p p p          p is the tokenizer's padding id, or EOS, which may be among a ... e too:
        shift_labels  b c d e - - - -          what is no target (-, -100) follows from the length, never from an id

Shapes: B rows of a micro-batch, T the recipe's block_size; a prepared block gives block_size_prepared / T rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from clm.order import Order, derive_key, permute
from data_prep.blocks import NO_TARGET, Blocks, copy_rows

if TYPE_CHECKING:
    from transformers import Trainer

    from clm.document_mask import DocumentMask
    from clm.timeline import Stage, Timeline

FILLER = -1  # a sample number: a block without targets, where a global batch does not divide (run.uneven_batch)
_LOOK_UP = 16384  # samples whose blocks are found at once


def as_batch(
    inputs: np.ndarray, targets: np.ndarray, mask: DocumentMask | None = None, with_labels: bool = True
) -> dict[str, Any]:
    """One micro-batch for a causal language model, from (B, T) inputs and targets.

    `labels` is the input itself: transformers computes a loss only when it is given, and uses `shift_labels` as they
    are (transformers/loss/loss_utils.py, ForCausalLMLoss), so nothing is shifted twice. Trainer, too, counts the
    targets of a batch in `shift_labels`. The loss-only forward (clm/loss_only.py) needs no labels.
    """
    input_ids = torch.from_numpy(np.ascontiguousarray(inputs))
    if mask is not None:
        targets = mask.targets(inputs, targets)
    batch = {"input_ids": input_ids, "shift_labels": torch.from_numpy(np.ascontiguousarray(targets))}
    if with_labels:
        batch["labels"] = input_ids
    return batch if mask is None else batch | mask.model_inputs(inputs)


class Rows(NamedTuple):
    """The blocks of a micro-batch as they were read: n prepared blocks of P tokens.

    `tokens` is int64 (n, P + 1), each block and the token after it. `targets`, int64 (n, P), is None where the target
    of each position is just the token after it. `samples` are the numbers of the blocks in the run.
    """

    tokens: np.ndarray
    targets: np.ndarray | None
    samples: list[int]
    block_size: int

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, both int64 (B, T)."""
        targets = self.tokens[:, 1:] if self.targets is None else self.targets
        return self.tokens[:, :-1].reshape(-1, self.block_size), targets.reshape(-1, self.block_size)


class PermutedTargets:
    """Targets drawn from anywhere in the corpus: position p gets the token at a permuted position.

    A control (`data.permute_labels`): nothing in the input says anything about the target any more, so the loss of a
    sound pipeline ends at the loss of knowing frequencies alone, and one that leaks targets ends below it.
    """

    def __init__(self, blocks: Blocks, seed: int):
        self.blocks = blocks
        self.key = derive_key(seed, "permuted targets")

    def targets(self, block_numbers: np.ndarray) -> np.ndarray:
        """(n, P) targets for n prepared blocks of P tokens."""
        size = self.blocks.block_size
        positions = block_numbers[:, None] * size + np.arange(size)
        return self.blocks.token_at(permute(positions, self.blocks.num_tokens, self.key))


class TrainBlocks(torch.utils.data.Dataset):
    """The run's samples: sample i is one prepared block, found by the order.

    Args:
        splits: the mixture's train splits, in the order of `order.sources`.
        order: which block sample i is.
        block_size: T of the stage; divides each prepared block size.
        num_samples: what len() says: Trainer counts in epochs, and the whole run is one.
        permute_seed: a seed for the permuted-labels control, None for training.
    """

    def __init__(
        self, splits: list[Blocks], order: Order, block_size: int, num_samples: int, permute_seed: int | None = None
    ):
        self.splits = splits
        self.order = order
        self.block_size = block_size
        self.num_samples = num_samples
        self.controls = [None if permute_seed is None else PermutedTargets(s, permute_seed) for s in splits]
        self._has_own_targets = any(split.is_padded for split in splits) or permute_seed is not None
        self._first_shard = np.cumsum([0, *(len(split.shard_starts) - 1 for split in splits)])  # of each dataset
        self._rows = _ShardRows(splits, self._first_shard)
        self._found: tuple[int, np.ndarray] = (-1, np.empty((0, 5), dtype=np.int64))  # first sample, and as in _look_up

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, sample: int) -> Rows:
        return self.__getitems__([sample])

    def __getitems__(self, samples: list[int]) -> Rows:
        """A whole micro-batch at once, in the order of the samples."""
        has_filler, numbers = FILLER in samples, samples
        if has_filler:  # which needs no block of its own
            numbers = np.where(np.asarray(samples) == FILLER, max(*samples, 0), samples).tolist()
        dataset, block, shard, number, is_last = self._find(numbers).T
        tokens = copy_rows(self._rows, shard, number, self.splits[0].block_size)
        tokens[is_last.nonzero(), -1] = NO_TARGET
        if not (self._has_own_targets or has_filler):
            return Rows(tokens, None, samples, self.block_size)
        targets = tokens[:, 1:].copy()
        for j, (split, control) in enumerate(zip(self.splits, self.controls, strict=True)):
            mine = np.flatnonzero(dataset == j)
            own = split.targets(tokens[mine], block[mine]) if control is None else control.targets(block[mine])
            if own is not None:
                targets[mine] = own
        is_filler = np.asarray(samples) == FILLER
        tokens[is_filler], targets[is_filler] = 0, NO_TARGET
        return Rows(tokens, targets, samples, self.block_size)

    def _find(self, samples: list[int]) -> np.ndarray:
        """`_look_up`, asked for many samples at once: for a micro-batch alone it takes longer than reading it."""
        first = min(samples) // _LOOK_UP * _LOOK_UP
        if max(samples) >= first + _LOOK_UP:
            return self._look_up(np.asarray(samples))
        if self._found[0] != first:
            self._found = (first, self._look_up(np.arange(first, first + _LOOK_UP)))
        return self._found[1][np.asarray(samples) - first]

    def _look_up(self, samples: np.ndarray) -> np.ndarray:
        """Where samples lie: dataset, block, shard (counted through all datasets), row in it, whether nothing follows;
        int64 (n, 5)."""
        found = np.empty((len(samples), 5), dtype=np.int64)
        found[:, 0], found[:, 1] = self.order.block_at(samples)
        for j, split in enumerate(self.splits):
            mine = np.flatnonzero(found[:, 0] == j)
            shards, numbers = split.locate(found[mine, 1])
            found[mine, 2], found[mine, 3] = shards + self._first_shard[j], numbers
            found[mine, 4] = split.nothing_follows(shards, numbers)
        return found


class _ShardRows(dict[int, np.ndarray]):
    """`Blocks.shard_rows` by the shard's number among all datasets, opened when first asked for; pickles empty."""

    def __init__(self, splits: list[Blocks], first_shard: np.ndarray):
        self.splits, self.first_shard = splits, first_shard

    def __missing__(self, shard: int) -> np.ndarray:
        dataset = int(np.searchsorted(self.first_shard, shard, side="right")) - 1
        self[shard] = self.splits[dataset].shard_rows(shard - int(self.first_shard[dataset]))
        return self[shard]

    def __reduce__(self):
        return _ShardRows, (self.splits, self.first_shard)


def collate(
    rows: Rows, mask: DocumentMask | None = None, with_samples: bool = False, with_labels: bool = True
) -> dict[str, Any]:
    """What the DataLoader calls on a micro-batch of TrainBlocks; `with_samples` adds the sample numbers.

    Where the target of each position is just the token after it, and no labels are wanted, it is {"tokens"}, int64
    (n, P + 1), which `as_inputs` takes apart on the device: each token is sent there once.
    """
    if rows.targets is None and mask is None and not with_labels:
        batch = {"tokens": torch.from_numpy(rows.tokens)}
    else:
        batch = as_batch(*rows.split(), mask, with_labels)
    return batch | {"samples": torch.tensor(rows.samples)} if with_samples else batch


def as_inputs(batch: dict[str, Any], block_size: int) -> dict[str, Any]:
    """What `collate` gave, as a model takes it: of {"tokens"} (B, T) input_ids and shift_labels, on the same device."""
    if "tokens" not in batch:
        return batch
    tokens = batch.pop("tokens")
    batch["input_ids"] = tokens[:, :-1].reshape(-1, block_size).contiguous()
    batch["shift_labels"] = tokens[:, 1:].reshape(-1, block_size).contiguous()
    return batch


def collate_as_stock(rows: Rows, mask: DocumentMask | None = None, with_samples: bool = False) -> dict[str, Any]:
    """The same micro-batch by transformers' default_data_collator, from one mapping per row (`run.speed: stock`)."""
    from transformers import default_data_collator

    inputs, targets = rows.split()
    batch = as_batch(inputs, targets, mask)
    if with_samples:
        batch["samples"] = torch.tensor(rows.samples).repeat_interleave(len(inputs) // len(rows.samples))
    features = [{name: values[i].tolist() for name, values in batch.items()} for i in range(len(inputs))]
    return default_data_collator(features)


class OrderSampler(torch.utils.data.Sampler[int]):
    """Sample numbers from the run's current position to the end of its stage.

    Replaces Trainer's RandomSampler. `__iter__` is lazy: Trainer builds the loader before it restores the state, so the
    position is read when iteration begins, and a resumed run starts at its exact sample without skipping any.
    """

    def __init__(self, trainer: Trainer, timeline: Timeline, stage: Stage):
        self.trainer = trainer
        self.timeline = timeline
        self.stage = stage

    def __len__(self) -> int:
        return self.timeline.num_steps * self.trainer.plan.slots_per_step(self.stage)  # as if all stages were this one

    def __iter__(self) -> Iterator[int]:
        for step in range(self.trainer.state.global_step + 1, self.stage.last_step + 1):
            samples = self.timeline.samples_of_step(step).tolist()
            yield from samples
            yield from [FILLER] * (self.trainer.plan.slots_per_step(self.stage) - len(samples))


class ValidationRows:
    """The first rows of one validation split, in written order.

    Args:
        name: the set's name in the metrics.
        blocks: its validation split.
        block_size: T of the recipe.
        max_tokens: use at most this many tokens (whole rows, at least one); None: all.
        permute_seed: as in TrainBlocks.
    """

    def __init__(
        self, name: str, blocks: Blocks, block_size: int, max_tokens: int | None, permute_seed: int | None = None
    ):
        self.name = name
        self.blocks = blocks
        self.block_size = block_size
        self.rows_per_block = blocks.block_size // block_size
        all_rows = blocks.num_blocks * self.rows_per_block
        self.num_rows = all_rows if max_tokens is None else min(all_rows, max(1, max_tokens // block_size))
        self.control = None if permute_seed is None else PermutedTargets(blocks, permute_seed)

    def read(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [first, first + count) as (count, T) inputs and targets; rows past the end are all -100 targets."""
        rows = np.arange(first, min(first + count, self.num_rows))
        inputs = np.zeros((count, self.block_size), dtype=np.int64)
        targets = np.full((count, self.block_size), NO_TARGET, dtype=np.int64)
        if rows.size:
            block_numbers = np.arange(rows[0] // self.rows_per_block, rows[-1] // self.rows_per_block + 1)
            skip = rows[0] - block_numbers[0] * self.rows_per_block
            read = self.blocks.read_rows(block_numbers)
            if self.control is not None:
                read = read[0], self.control.targets(block_numbers)
            for out, found in zip((inputs, targets), read, strict=True):
                out[: rows.size] = found.reshape(-1, self.block_size)[skip : skip + rows.size]
        return inputs, targets

    def describe(self) -> dict[str, Any]:
        """For the resolved recipe: the set's name and how many tokens are evaluated."""
        return {"name": self.name, "folder": str(self.blocks.folder), "num_tokens": self.num_rows * self.block_size}
