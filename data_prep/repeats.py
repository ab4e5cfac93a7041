"""Documents that stand in a dataset more than once, found by 64 bits of a hash of their tokens.

In: hashes, documents in order. Out: how many are copies of an earlier one, and which texts are repeated most. Of a
split with more documents than fit into memory only those are kept whose hash is divisible by `one_in`, a power of two:
all copies of a text are kept or none is, so their share can be read from the kept ones.
"""

from dataclasses import dataclass

import numpy as np
import xxhash

from data_prep.blocks import Blocks
from data_prep.documents import DocumentMap
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
        self._num_kept = 0
        self._hashes: list[np.ndarray] = []
        self._numbers: list[np.ndarray] = []
        self._num_tokens: list[np.ndarray] = []

    def add(self, hashes: np.ndarray, numbers: np.ndarray, num_tokens: np.ndarray) -> None:
        """Documents with their hashes (uint64), numbers in the split (int64) and lengths."""
        is_kept = hashes % self.one_in == 0
        self._hashes.append(hashes[is_kept])
        self._numbers.append(numbers[is_kept])
        self._num_tokens.append(num_tokens[is_kept].astype(np.uint32))
        self._num_kept += len(self._hashes[-1])
        while self._num_kept > MAX_KEPT:
            self.one_in *= 2
            kept = [hashes % self.one_in == 0 for hashes in self._hashes]
            for column in (self._hashes, self._numbers, self._num_tokens):
                column[:] = [values[is_kept] for values, is_kept in zip(column, kept, strict=True)]
            self._num_kept = sum(len(hashes) for hashes in self._hashes)

    def hashes(self, one_in: int) -> np.ndarray:
        """The kept hashes that are divisible by `one_in`, each once."""
        return np.unique(np.concatenate([np.empty(0, np.uint64), *(each[each % one_in == 0] for each in self._hashes)]))

    def find(self, num_most: int) -> Repeats:
        """The result, with so many of the most repeated texts; the finder is empty then."""
        hashes = _join(self._hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")  # equal ones stay in the order of the documents
        hashes = hashes[order]
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = hashes[1:] != hashes[:-1]
        del hashes
        starts = np.flatnonzero(is_first)
        how_often = np.diff(np.append(starts, len(order)))
        num_tokens = _join(self._num_tokens, np.uint32)
        num_copied_tokens = int(num_tokens[order[~is_first]].sum(dtype=np.int64))
        numbers = _join(self._numbers, np.int64)
        most = np.argsort(-how_often, kind="stable")[:num_most]
        return Repeats(
            self.one_in,
            len(order),
            len(order) - len(starts),
            int(num_tokens.sum(dtype=np.int64)),
            num_copied_tokens,
            [(int(how_often[i]), int(numbers[order[starts[i]]])) for i in most if how_often[i] > 1],
        )


def hash_documents(blocks: Blocks, documents: DocumentMap, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """64 bits of XXH3 of the ids of documents [first, end) of the stream, which lie in the blocks (int64): uint64."""
    out = np.empty(len(first), dtype=np.uint64)
    if blocks.is_padded:
        for i in range(len(first)):
            out[i] = _hash_ranges(blocks, documents.ranges(int(first[i]), int(end[i])))
        return out
    starts = blocks.shard_starts * blocks.block_size
    shard, last = (np.searchsorted(starts, token, side="right") - 1 for token in (first, end - 1))
    for number in np.unique(shard).tolist():
        here = np.flatnonzero((shard == number) & (last == number))
        ids = memoryview(blocks.shard_tokens(number)).cast("B")
        begin, stop = ((token[here] - starts[number]) * blocks.dtype.itemsize for token in (first, end))
        ranges = zip(begin.tolist(), stop.tolist(), strict=True)
        out[here] = _as_number(b"".join([xxhash.xxh3_64_digest(ids[a:b]) for a, b in ranges]))
    for i in np.flatnonzero(shard != last).tolist():
        out[i] = _hash_ranges(blocks, [(int(first[i]), int(end[i]))])
    return out


def _hash_ranges(blocks: Blocks, ranges: list[tuple[int, int]]) -> np.uint64:
    digest = xxhash.xxh3_64()
    for first, end in ranges:
        for tokens in iter_tokens(blocks, first, end):
            digest.update(tokens)
    return _as_number(digest.digest())[0]


def _as_number(digests: bytes) -> np.ndarray:
    return np.frombuffer(digests, dtype=np.uint64)


def _join(parts: list[np.ndarray], kind: type) -> np.ndarray:
    """All parts as one array; the list is emptied, so that nothing is held twice for long."""
    joined = np.concatenate([np.empty(0, kind), *parts])
    parts.clear()
    return joined
