"""Which block is sample i? A pure function of (seed, stages, i): no state, no index arrays, the same everywhere.

In: the datasets of the run (number of blocks), its stages (length, share of each dataset) and a seed.
Out: `block_at(i)` -> (dataset, block), and the way back, `samples_of(dataset, block)`.

    samples 0..2047 = window 0, 2048..4095 = window 1, ...         (a window is W samples, a power of two)
    sample i -> window w = i // W, slot s = i % W -> dealt[s], the dataset whose share of the window holds permute_w(s)
             -> that dataset's m-th sample of the run -> pass m // n, block permute_pass(m % n)

Up to any window border of a stage dataset j has had round(C_j N) - round(C_{j-1} N) of its N samples, C being the
cumulative shares: within one block of its share. A dataset's samples are numbered through the whole run, over windows
and stages, so that a pass visits each of its blocks once wherever a stage ends; every pass has its own permutation.

The keyed permutation is a balanced Feistel network on the next even number of bits with cycle walking.
Source: J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 3 (cycle walking) and 5
(generalised Feistel). Round function: the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from itertools import count

import numpy as np

ORDER_VERSION = 2  # stored in every checkpoint; a change of anything below is a new number
_NUM_ROUNDS = 8
_CHUNK = 1 << 16  # samples handled at once: the working arrays stay in the CPU cache
_MAX_WINDOWS_KEPT = 64


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from integers and texts (blake2b), the same on every platform."""
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every input bit changes half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _tweak(number: int) -> np.uint64:
    return np.uint64((0x9E3779B97F4A7C15 * number) % 2**64)


def _round_tables(key: int, mask: np.uint64) -> dict[int, np.ndarray]:
    """What each round mixes in, for every right half: cheaper where there are more indices than halves."""
    halves = np.arange(int(mask) + 1, dtype=np.uint64) + np.uint64(key)
    return {number: _mix(halves + _tweak(number)) & mask for number in range(1, _NUM_ROUNDS + 1)}


def permute(indices: np.ndarray, size: int, keys: np.ndarray | int, inverse: bool = False) -> np.ndarray:
    """A keyed pseudo-random permutation of range(size).

    Args:
        indices: integers in [0, size).
        size: length of the permuted range.
        keys: one 64-bit key, or one for each index.
        inverse: undo the permutation of the same key.
    Returns:
        int64 array: for a fixed key, every number of range(size) once as the indices run through it.
    """
    indices, is_one_key = np.asarray(indices, dtype=np.uint64), np.ndim(keys) == 0
    keys = np.broadcast_to(np.asarray(keys, dtype=np.uint64), indices.shape)
    if size <= 1:
        return np.zeros(indices.shape, dtype=np.int64)
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    rounds = range(_NUM_ROUNDS, 0, -1) if inverse else range(1, _NUM_ROUNDS + 1)
    tables = _round_tables(int(keys.flat[0]), mask) if is_one_key and indices.size > mask else None
    result = walking = indices.ravel()
    key, todo = keys.ravel(), None  # places in `result` that are still outside of the range; None: all
    with np.errstate(over="ignore"):
        while walking.size:
            left, right = walking >> half, walking & mask
            if inverse:
                left, right = right, left
            for number in rounds:
                if tables:
                    mixed = tables[number].take(right.view(np.int64), mode="clip")
                else:
                    mixed = _mix(right + key + _tweak(number)) & mask
                left, right = right, left ^ mixed
            if inverse:
                left, right = right, left
            walking = (left << half) | right
            if todo is None:
                result = walking
            else:
                result[todo] = walking
            outside = np.flatnonzero(walking >= np.uint64(size))  # cycle walking: once more until it is inside
            todo, walking, key = outside if todo is None else todo[outside], walking[outside], key[outside]
    return result.reshape(indices.shape).astype(np.int64)


@dataclass(frozen=True)
class OrderSource:
    """One dataset of the run as the order sees it."""

    num_blocks: int


@dataclass(frozen=True)
class OrderStage:
    """A part of the run with one mixture: `shares` of the sources sum to 1; the last stage has no end (None)."""

    num_samples: int | None
    shares: tuple[Fraction, ...]


class Order:
    """The order of prepared blocks for a whole run.

    Args:
        sources: all datasets of the run, each with at least one block.
        stages: one after the other; only the last may have no end.
        seed: the recipe's data seed.
        shuffle: False gives each dataset's written order (a mixture still interleaves its datasets).
    """

    def __init__(self, sources: list[OrderSource], stages: list[OrderStage], seed: int, shuffle: bool = True):
        assert sources and stages and all(s.num_blocks > 0 for s in sources)
        assert all(sum(s.shares) == 1 and len(s.shares) == len(sources) and min(s.shares) >= 0 for s in stages)
        self.sources = sources
        self.seed = seed
        self.shuffle = shuffle
        self._parts: list[_Part] = []
        first, base = 0, [0] * len(sources)
        for index, stage in enumerate(stages):
            part = _Part(first, stage, base, derive_key(seed, "stage", index))
            self._parts.append(part)
            if stage.num_samples is not None:
                first, base = first + stage.num_samples, part.counts_before(stage.num_samples)

    def counts_before(self, sample: int) -> list[int]:
        """How many samples each dataset has had before sample number `sample`."""
        part = self._parts[self._part_of(sample)]
        return part.counts_before(sample - part.first)

    def passes(self, sample: int) -> list[float]:
        """How often each dataset has been passed over before sample number `sample`."""
        counts = self.counts_before(sample)
        return [count / source.num_blocks for count, source in zip(counts, self.sources, strict=True)]

    def block_at(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of some samples.

        Args:
            samples: sample numbers, any order, any size.
        Returns:
            (dataset, block): int64 arrays of the same shape; dataset indexes `sources`, block its prepared blocks.
        """
        samples = np.asarray(samples, dtype=np.int64)
        flat = samples.ravel()
        dataset, block = np.empty_like(flat), np.empty_like(flat)
        for i in range(0, flat.size, _CHUNK):
            here = slice(i, i + _CHUNK)
            dataset[here], block[here] = self._block_at(flat[here])
        return dataset.reshape(samples.shape), block.reshape(samples.shape)

    def samples_of(self, dataset: int, block: int, end_sample: int) -> list[int]:
        """Every sample number below `end_sample` that is this block, ascending: one in each pass over its dataset."""
        size, found = self.sources[dataset].num_blocks, []
        most = self.counts_before(end_sample)[dataset]
        for number in count():
            within = block
            if self.shuffle:
                within = int(permute(np.array([block]), size, self._pass_key(dataset, number), inverse=True)[0])
            if number * size + within >= most:
                return found
            found.append(self._sample_of(dataset, number * size + within))

    def _block_at(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        dataset, ordinal = np.empty_like(samples), np.empty_like(samples)
        firsts = np.array([part.first for part in self._parts])
        stages = np.searchsorted(firsts, samples, side="right") - 1
        for s in np.unique(stages):
            here = stages == s
            dataset[here], ordinal[here] = self._parts[s].source_and_ordinal(samples[here] - firsts[s])
        block = np.empty_like(ordinal)
        for j, source in enumerate(self.sources):
            mine = np.flatnonzero(dataset == j)
            if not mine.size:
                continue
            number, within = np.divmod(ordinal[mine], source.num_blocks)
            if self.shuffle:
                passes = np.unique(number) if number.min() < number.max() else number[:1]
                keys = np.array([self._pass_key(j, p) for p in passes.tolist()], dtype=np.uint64)
                one_or_each = keys[0] if len(passes) == 1 else keys[np.searchsorted(passes, number)]
                within = permute(within, source.num_blocks, one_or_each)
            block[mine] = within
        return dataset, block

    def _sample_of(self, dataset: int, ordinal: int) -> int:
        """The sample that is the dataset's `ordinal`-th of the run."""
        part = next(p for p in reversed(self._parts) if p.base[dataset] <= ordinal and p.shares[dataset])
        return part.first + part.slot_of(dataset, ordinal)

    def _part_of(self, sample: int) -> int:
        return max(i for i, part in enumerate(self._parts) if part.first <= sample)

    def _pass_key(self, dataset: int, number: int) -> int:
        return derive_key(self.seed, "pass", dataset, number)


class _Part:
    """One stage inside the order: which dataset each of its samples is of, and the how-manieth of that dataset."""

    def __init__(self, first: int, stage: OrderStage, base: list[int], key: int):
        self.first = first  # its first sample in the run
        self.shares = stage.shares
        self.base = base  # samples of each dataset before the stage
        self.key = key
        self.cumulative = [sum(self.shares[: j + 1], Fraction(0)) for j in range(len(self.shares))]
        need = max(1024, int(2 / min(share for share in self.shares if share)) + 1)
        self.window = 1 << (need - 1).bit_length()
        self.only = self.shares.index(1) if 1 in self.shares else None
        self._dealt: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def counts_before(self, num_samples: int) -> list[int]:
        """Samples of each dataset before the stage's sample `num_samples`, those of earlier stages included."""
        window, slot = divmod(num_samples, self.window)
        counts = [a + b for a, b in zip(self.base, self._at_border(window), strict=True)]
        if slot:
            inside = np.bincount(self._deal(window)[0][:slot], minlength=len(counts))
            counts = [a + int(b) for a, b in zip(counts, inside, strict=True)]
        return counts

    def source_and_ordinal(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each sample of the stage its dataset, and which sample of that dataset it is in the run."""
        if self.only is not None:
            return np.full_like(samples, self.only), samples + self.base[self.only]
        dataset, ordinal = np.empty_like(samples), np.empty_like(samples)
        windows, slots = np.divmod(samples, self.window)
        for w in np.unique(windows):
            here = windows == w
            dealt, rank = self._deal(int(w))
            before = np.array(self.base) + self._at_border(int(w))
            which = dealt[slots[here]]
            dataset[here], ordinal[here] = which, before[which] + rank[slots[here]]
        return dataset, ordinal

    def slot_of(self, dataset: int, ordinal: int) -> int:
        """The way back: the stage's sample that is the dataset's `ordinal`-th of the run."""
        ordinal -= self.base[dataset]
        if self.only is not None:
            return ordinal
        low, high = 0, 1
        while self._at_border(high)[dataset] <= ordinal:
            high *= 2
        while low + 1 < high:  # the last window before which the dataset has had at most `ordinal` samples
            middle = (low + high) // 2
            low, high = (middle, high) if self._at_border(middle)[dataset] <= ordinal else (low, middle)
        dealt, _ = self._deal(low)
        slots = np.flatnonzero(dealt == dataset)
        return low * self.window + int(slots[ordinal - self._at_border(low)[dataset]])

    def _at_border(self, window: int) -> list[int]:
        """Samples of each dataset in the stage before a window."""
        borders = [0] + [_round(c * window * self.window) for c in self.cumulative]
        return [b - a for a, b in zip(borders, borders[1:], strict=False)]

    def _deal(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """For each slot of a window its dataset, and how many slots of that dataset lie before it."""
        if window not in self._dealt:
            before, after = np.array(self._at_border(window)), np.array(self._at_border(window + 1))
            first_slot = np.concatenate([[0], np.cumsum(after - before)])
            slots = permute(np.arange(self.window), self.window, derive_key(self.key, "window", window))
            dealt = np.searchsorted(first_slot, slots, side="right") - 1
            rank = np.empty(self.window, dtype=np.int64)
            for j in range(len(self.shares)):
                mine = dealt == j
                rank[mine] = np.arange(np.count_nonzero(mine))
            if len(self._dealt) >= _MAX_WINDOWS_KEPT:
                self._dealt.clear()
            self._dealt[window] = dealt, rank
        return self._dealt[window]


def _round(x: Fraction) -> int:
    """Round half up, exactly; Python's round() goes to even, which would make borders jump by two."""
    return (2 * x.numerator + x.denominator) // (2 * x.denominator)
