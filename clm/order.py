"""Which block is sample i? A pure function of (seed, mixture, i): no state, no index arrays, the same everywhere.

In: the datasets of the mixture (number of blocks, weight) and a seed. Out: `block_at(i)` -> (dataset, block).

    samples 0..2047 = window 0, 2048..4095 = window 1, ...          (a window is W samples, a power of two)
    sample i -> window w = i // W, slot s = permute_w(i % W) -> the dataset whose share of the window holds slot s
             -> that dataset's m-th sample of the run -> pass m // n, block permute_pass(m % n)

Up to any window border dataset j has had round(C_j N) - round(C_{j-1} N) samples, C being the cumulative weights:
within one block of its share. A pass over a dataset visits each of its blocks once; every pass has its own permutation.

The keyed permutation is a balanced Feistel network on the next even number of bits with cycle walking.
Source: J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 3 (cycle walking) and 5
(generalised Feistel). Round function: the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

ORDER_VERSION = 1  # stored in every checkpoint; a change of anything below is a new number
_NUM_ROUNDS = 8
_CHUNK = 1 << 16  # samples handled at once: the working arrays stay in the CPU cache


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from integers and texts (blake2b), the same on every platform."""
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every input bit changes half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices: np.ndarray, size: int, keys: np.ndarray | int) -> np.ndarray:
    """A keyed pseudo-random permutation of range(size).

    Args:
        indices: integers in [0, size).
        size: length of the permuted range.
        keys: one 64-bit key, or one for each index.
    Returns:
        int64 array: for a fixed key, every number of range(size) once as the indices run through it.
    """
    indices = np.asarray(indices, dtype=np.uint64)
    keys = np.broadcast_to(np.asarray(keys, dtype=np.uint64), indices.shape)
    if size <= 1:
        return np.zeros(indices.shape, dtype=np.int64)
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    values = indices.copy()
    todo = np.arange(values.size)
    current, key = values.ravel(), keys.ravel()
    result = current.copy()
    walking = current
    with np.errstate(over="ignore"):
        while todo.size:
            left, right = walking >> half, walking & mask
            for round_number in range(_NUM_ROUNDS):
                tweak = key + np.uint64((0x9E3779B97F4A7C15 * (round_number + 1)) % 2**64)
                left, right = right, left ^ (_mix(right + tweak) & mask)
            walking = (left << half) | right
            inside = walking < np.uint64(size)
            result[todo[inside]] = walking[inside]
            outside = ~inside  # cycle walking: encrypt again until the value falls into the range
            todo, walking, key = todo[outside], walking[outside], key[outside]
    return result.reshape(indices.shape).astype(np.int64)


@dataclass(frozen=True)
class OrderSource:
    """One dataset of the mixture as the order sees it."""

    num_blocks: int
    weight: Fraction


class Order:
    """The order of prepared blocks for a whole run.

    Args:
        sources: datasets of the mixture, each with at least one block; weights on any scale.
        seed: the recipe's data seed.
        shuffle: False gives each dataset's written order (a mixture still interleaves its datasets).
    """

    def __init__(self, sources: list[OrderSource], seed: int, shuffle: bool = True):
        assert sources and all(s.num_blocks > 0 and s.weight > 0 for s in sources)
        total = sum(s.weight for s in sources)
        self.sources = sources
        self.seed = seed
        self.shuffle = shuffle
        self.shares = [s.weight / total for s in sources]
        self.cumulative = [sum(self.shares[: j + 1], Fraction(0)) for j in range(len(sources))]
        need = max(1024, int(2 / min(self.shares)) + 1)
        self.window = 1 << (need - 1).bit_length()

    def counts_before(self, num_samples: int) -> list[int]:
        """How many samples each dataset has had before sample `num_samples`, a multiple of the window."""
        borders = [0] + [_round(c * num_samples) for c in self.cumulative]
        return [b - a for a, b in zip(borders, borders[1:], strict=False)]

    def passes(self, num_samples: int) -> list[float]:
        """How often a run of `num_samples` samples passes over each dataset."""
        return [float(share * num_samples / s.num_blocks) for share, s in zip(self.shares, self.sources, strict=True)]

    def block_at(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of some samples.

        Args:
            samples: sample numbers, any order, any size.
        Returns:
            (dataset, block): int64 arrays of the same shape; dataset indexes `sources`, block its prepared blocks.
        """
        samples = np.asarray(samples, dtype=np.int64)
        flat = samples.ravel()
        parts = [self._block_at(flat[i : i + _CHUNK]) for i in range(0, flat.size, _CHUNK)]
        dataset = np.concatenate([p[0] for p in parts]) if parts else np.zeros(0, np.int64)
        block = np.concatenate([p[1] for p in parts]) if parts else np.zeros(0, np.int64)
        return dataset.reshape(samples.shape), block.reshape(samples.shape)

    def _block_at(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        dataset, ordinal = self._source_and_ordinal(samples)
        block = np.empty_like(ordinal)
        for j, source in enumerate(self.sources):
            mine = dataset == j
            number, within = np.divmod(ordinal[mine], source.num_blocks)
            if self.shuffle:
                keys = np.zeros(number.shape, dtype=np.uint64)
                for p in np.unique(number):
                    keys[number == p] = derive_key(self.seed, "pass", j, int(p))
                within = permute(within, source.num_blocks, keys)
            block[mine] = within
        return dataset, block

    def _source_and_ordinal(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each sample its dataset, and which sample of that dataset it is, counted from the start of the run."""
        if len(self.sources) == 1:
            return np.zeros_like(samples), samples.copy()
        dataset, ordinal = np.empty_like(samples), np.empty_like(samples)
        windows, slots = np.divmod(samples, self.window)
        for w in np.unique(windows):
            here = windows == w
            before = np.array(self.counts_before(int(w) * self.window))
            after = np.array(self.counts_before((int(w) + 1) * self.window))
            first_slot = np.concatenate([[0], np.cumsum(after - before)])
            key = derive_key(self.seed, "window", int(w))
            if self.shuffle:
                slot = permute(slots[here], self.window, key)
                which = np.searchsorted(first_slot, slot, side="right") - 1
                dataset[here], ordinal[here] = which, before[which] + slot - first_slot[which]
            else:  # the datasets are interleaved, and each keeps its own order: its samples are numbered as they come
                every = np.searchsorted(first_slot, permute(np.arange(self.window), self.window, key), side="right") - 1
                rank = np.empty(self.window, dtype=np.int64)
                for j in range(len(self.sources)):
                    rank[every == j] = np.arange(np.count_nonzero(every == j))
                which = every[slots[here]]
                dataset[here], ordinal[here] = which, before[which] + rank[slots[here]]
        return dataset, ordinal


def _round(x: Fraction) -> int:
    """Round half up, exactly; Python's round() goes to even, which would make borders jump by two."""
    return (2 * x.numerator + x.denominator) // (2 * x.denominator)
