"""A prepared block as text, with all that is known of it.

In: a split and a block number. Out: its tokens, its place, and its parts: one per document, each with the range of
UTF-8 bytes of the document's text as it was tokenized (data_prep/parts.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data_prep.blocks import NO_TARGET, Blocks
from data_prep.documents import DocumentMap
from data_prep.parts import Part, find_parts


@dataclass
class BlockText:
    """One prepared block of P tokens with all that is known of it.

    `tokens` is (P + 1,) as `Blocks.read` gives it: the last is the one that follows, or NO_TARGET; NO_TARGET for
    padding. `losses` is (P,): position i holds the loss of token i + 1.
    """

    dataset: str
    block: int
    shard_file: str
    shard_row: int
    tokens: np.ndarray
    parts: list[Part]
    seen_as: dict[str, int] = field(default_factory=dict)  # sample, rank, micro_batch, where it is part of a step
    losses: np.ndarray | None = None

    @property
    def first_token(self) -> int:
        """Position of its first token in the split."""
        return self.block * (len(self.tokens) - 1)

    @property
    def num_tokens(self) -> int:
        """Tokens in the block without padding."""
        return int(np.count_nonzero(self.tokens[:-1] != NO_TARGET))

    @property
    def mean_loss(self) -> float:
        """Nats per target, NaN without losses."""
        return mean(self.losses)

    def loss_of(self, position: int) -> float:
        """The loss of the token at a position of the block, 0 ... P; NaN where nothing in the block predicts it."""
        return float("nan") if self.losses is None or position == 0 else float(self.losses[position - 1])


def read_block(blocks: Blocks, documents: DocumentMap | None, name: str, block: int, lengths: np.ndarray) -> BlockText:
    """One block with its documents; without a document map, `parts` is empty."""
    shard, row = (int(each) for each in blocks.locate(np.array(block)))
    first, end = block * blocks.block_size, (block + 1) * blocks.block_size
    file = blocks.manifest.splits[blocks.split].shards[shard].file
    parts = [] if documents is None else find_parts(blocks, documents, lengths, first, end)
    return BlockText(name, block, file, row, blocks.read(np.array([block]))[0], parts)


def mean(losses: np.ndarray | None) -> float:
    """The mean over the targets that there are, NaN for none."""
    there = [] if losses is None else losses[~np.isnan(losses)]
    return float(np.mean(there, dtype=np.float64)) if len(there) else float("nan")
