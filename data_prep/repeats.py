"""Documents that stand in a dataset more than once, found by 64 bits of a hash of their tokens.

In: hashes, documents in order. Out: how many are copies of an earlier one, and which texts are repeated most. Of a
split with more documents than fit into memory only those are kept whose hash is divisible by `one_in`, a power of two:
all copies of a text are kept or none is, so their share can be read from the kept ones.
"""

from dataclasses import dataclass

import numpy as np
import xxhash

from data_prep.blocks import Blocks
from data_prep.parts import iter_tokens

MAX_KEPT = 2**24  # documents at 20 bytes each


@dataclass(frozen=True)
class Repeats:
    """What was found; counts are of the kept documents, one in `one_in`."""

    one_in: int
    num_documents: int
    num_copies: int  # documents whose tokens an earlier one has
    num_tokens: int
    num_copied_tokens: int
    most: list[tuple[int, int]]  # (how often, number of the first document) of the most repeated texts

    @property
    def copies_fraction(self) -> float:
        """The share of the documents that are copies."""
        return self.num_copies / max(self.num_documents, 1)


class RepeatFinder:
    """Collects the hashes of one split."""

    def __init__(self) -> None:
        self.one_in = 1
        self._kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._num_kept = 0

    def add(self, hashes: np.ndarray, numbers: np.ndarray, num_tokens: np.ndarray) -> None:
        """Documents with their hashes (uint64), numbers in the split (int64) and lengths."""
        self._kept.append(self._choose(hashes, numbers, num_tokens.astype(np.uint32)))
        self._num_kept += len(self._kept[-1][0])
        while self._num_kept > MAX_KEPT:
            self.one_in *= 2
            self._kept = [self._choose(*each) for each in self._kept]
            self._num_kept = sum(len(hashes) for hashes, _, _ in self._kept)

    def hashes(self, one_in: int) -> np.ndarray:
        """The kept hashes that are divisible by `one_in`, each once."""
        return np.unique(
            np.concatenate([np.empty(0, np.uint64), *(each[0][each[0] % one_in == 0] for each in self._kept)])
        )

    def find(self, num_most: int) -> Repeats:
        """The result, with so many of the most repeated texts."""
        kinds = (np.uint64, np.int64, np.uint32)
        hashes, numbers, num_tokens = (
            np.concatenate([np.empty(0, kind), *(each[column] for each in self._kept)])
            for column, kind in enumerate(kinds)
        )
        order = np.argsort(hashes, kind="stable")  # equal ones stay in the order of the documents
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = np.diff(hashes[order]) != 0
        starts = np.flatnonzero(is_first)
        how_often = np.diff(np.append(starts, len(order)))
        most = np.argsort(-how_often, kind="stable")[:num_most]
        return Repeats(
            self.one_in,
            len(order),
            len(order) - len(starts),
            int(num_tokens.sum(dtype=np.int64)),
            int(num_tokens[order[~is_first]].sum(dtype=np.int64)),
            [(int(how_often[i]), int(numbers[order[starts[i]]])) for i in most if how_often[i] > 1],
        )

    def _choose(self, *columns: np.ndarray) -> tuple[np.ndarray, ...]:
        if self.one_in == 1:
            return columns
        is_kept = columns[0] % self.one_in == 0
        return tuple(column[is_kept] for column in columns)


def hash_documents(blocks: Blocks, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """64 bits of XXH3 of the ids of documents [first, end), which lie in the blocks (int64): uint64."""
    out = np.empty(len(first), dtype=np.uint64)
    starts = blocks.shard_starts * blocks.block_size
    shard, last = (np.searchsorted(starts, token, side="right") - 1 for token in (first, end - 1))
    for number in np.unique(shard).tolist():
        here = np.flatnonzero((shard == number) & (last == number))
        ids = memoryview(blocks.shard_tokens(number)).cast("B")
        begin, stop = ((token[here] - starts[number]) * blocks.dtype.itemsize for token in (first, end))
        ranges = zip(begin.tolist(), stop.tolist(), strict=True)
        out[here] = _as_number(b"".join([xxhash.xxh3_64_digest(ids[a:b]) for a, b in ranges]))
    for i in np.flatnonzero(shard != last).tolist():
        digest = xxhash.xxh3_64()
        for tokens in iter_tokens(blocks, int(first[i]), int(end[i])):
            digest.update(tokens)
        out[i] = _as_number(digest.digest())[0]
    return out


def _as_number(digests: bytes) -> np.ndarray:
    return np.frombuffer(digests, dtype=np.uint64)
