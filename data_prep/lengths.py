"""Lengths of documents as a histogram of fixed size: any number of documents in 30 kB of memory.

In: lengths, in any number of batches. Out: quantiles, exact up to 1,024 and within 0.6 % above, and coarse bins to
draw.
"""

import math
from dataclasses import dataclass, field

import numpy as np

_EXACT = 1024  # lengths below have a bin each
_PER_OCTAVE = 128  # bins between a power of two and the next, above
_NUM_BINS = _EXACT + (32 - 10) * _PER_OCTAVE + 1  # lengths are uint32


def _zeros() -> np.ndarray:
    return np.zeros(_NUM_BINS, dtype=np.int64)


@dataclass
class Lengths:
    """How many documents have which length, and how much they hold together."""

    counts: np.ndarray = field(default_factory=_zeros)
    totals: np.ndarray = field(default_factory=_zeros)  # the lengths of each bin, added up
    largest: int = 0

    def add(self, lengths: np.ndarray) -> None:
        """Count these lengths too: whole numbers from 0 to 2**32."""
        if not len(lengths):
            return
        lengths = lengths.astype(np.int64)
        bins = lengths.copy()
        is_long = lengths >= _EXACT
        bins[is_long] = _EXACT + ((np.log2(lengths[is_long]) - 10) * _PER_OCTAVE).astype(np.int64)
        self.counts += np.bincount(bins, minlength=_NUM_BINS)
        # weights are summed as float64: exact up to 2**53
        self.totals += np.bincount(bins, weights=lengths, minlength=_NUM_BINS).astype(np.int64)
        self.largest = max(self.largest, int(lengths.max()))

    @property
    def num(self) -> int:
        """How many lengths there are."""
        return int(self.counts.sum())

    @property
    def total(self) -> int:
        """All lengths added up."""
        return int(self.totals.sum())

    @property
    def mean(self) -> float:
        """The mean length; 0 where there is none."""
        return self.total / self.num if self.num else 0.0

    def quantile(self, fraction: float) -> int:
        """The length that this share of the documents does not pass: exact below 1,024, else within 0.6 %."""
        if not self.num:
            return 0
        found = int(np.searchsorted(np.cumsum(self.counts), max(1, math.ceil(fraction * self.num))))
        return found if found < _EXACT else min(round(2 ** (10 + (found - _EXACT + 0.5) / _PER_OCTAVE)), self.largest)

    def coarse(self, per_octave: int) -> list[tuple[float, float, int, int]]:
        """(from, to, documents, their lengths added up) of bins of equal width on a logarithmic scale, none left out.

        Lengths of 0 stand in the first one.
        """
        used = np.flatnonzero(self.counts)
        if not len(used):
            return []
        fine = np.arange(_NUM_BINS)
        length = np.where(fine < _EXACT, np.maximum(fine, 1), 2 ** (10 + (fine - _EXACT + 0.5) / _PER_OCTAVE))
        coarse = np.floor(np.log2(length) * per_octave + 1e-9).astype(int)
        first, last = int(coarse[used[0]]), int(coarse[used[-1]])
        out = []
        for number in range(first, last + 1):
            here = coarse == number
            borders = (2 ** (number / per_octave), 2 ** ((number + 1) / per_octave))
            out.append((*borders, int(self.counts[here].sum()), int(self.totals[here].sum())))
        return out
