"""Which documents share a block: the packings other than `concat`, from the lengths of documents alone.

In: the tokens of each document of a window. Out: `Packed`, its pieces in block order. No token is lost: what is longer
than a block is cut into pieces of a whole block and a rest, which lies elsewhere. Worked example, block_size 8,
documents of 3, 18 and 5 tokens, so pieces of 3, 8, 8, 2 and 5:

    best_fit   [3 5] [8] [8] [2 . . . . . .]      pad   [3 . . . . .] [8] [8] [2 . . . . . .] [5 . . .]

`best_fit` is best-fit decreasing: the longest piece first, each into the fullest block that has room for it.
Source: H. Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024 (arXiv 2404.10830), section 3.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

CONCAT, BEST_FIT, PAD = PACKINGS = ("concat", "best_fit", "pad")
# Documents are packed in windows, so that memory does not grow with the corpus. A window holds the documents that begin
# in so many tokens of the stream: it depends on nothing else, not on workers and not on units.
WINDOW_TOKENS = 2**24
MIN_WINDOW_BLOCKS = 512  # where blocks are long: a window's last block is seldom full


@dataclass(frozen=True)
class Packed:
    """The pieces of a window in block order; int64 arrays of one length.

    Piece i is `length[i]` tokens from `first[i]` on, counted from the window's first token; it lies in block `block[i]`
    of the window at `offset[i]`. In a block pieces follow each other without a gap, in the order of the documents.
    """

    first: np.ndarray
    length: np.ndarray
    block: np.ndarray
    offset: np.ndarray

    @property
    def block_lengths(self) -> np.ndarray:
        """Tokens in each block of the window, without padding; int64."""
        starts = np.flatnonzero(np.diff(self.block, prepend=-1))
        return np.add.reduceat(self.length, starts) if len(starts) else self.length


def pack(lengths: np.ndarray, block_size: int, packing: str) -> Packed:
    """Cut the documents of a window and lay the pieces into blocks.

    Args:
        lengths: tokens of each document, in order, each above 0.
        packing: BEST_FIT or PAD.
    """
    first, length = cut(lengths, block_size)
    if packing == PAD:
        every = np.arange(len(length))
        return Packed(first, length, every, np.zeros_like(every))
    found = best_fit(length, block_size)
    _, earliest, found = np.unique(found, return_index=True, return_inverse=True)
    number = np.empty_like(earliest)
    number[np.argsort(earliest)] = np.arange(len(earliest))  # blocks in the order of their first documents
    block = number[found]
    order = np.argsort(block, kind="stable")
    first, length, block = first[order], length[order], block[order]
    before = np.cumsum(length) - length
    is_first = np.diff(block, prepend=-1) > 0
    return Packed(first, length, block, before - before[is_first][block])


def cut(lengths: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(first, length) of the pieces of documents that follow each other: whole blocks, then the rest of a document."""
    lengths = np.asarray(lengths, dtype=np.int64)
    num_pieces = -(-lengths // block_size)
    ends = np.cumsum(lengths)
    which = np.arange(num_pieces.sum()) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    first = np.repeat(ends - lengths, num_pieces) + which * block_size
    return first, np.minimum(np.repeat(ends, num_pieces) - first, block_size)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: the bin of each item, int64; bins are numbered as they are opened.

    Items of one length and bins with the same room are handled together: an item goes into the bin with the least room
    for it, which then has even less, so the next equal item goes there too while it fits. So a bin of room r takes
    floor(r / length) of them in a row, then comes the next one. The steps are a few for each different length, however
    many items there are.

    Args:
        lengths: each in 1 ... capacity.
    """
    kind = np.uint16 if capacity <= np.iinfo(np.uint16).max else np.int64  # NumPy sorts 16 bits by counting
    order = np.argsort((capacity - lengths).astype(kind), kind="stable")
    counts = np.bincount(lengths, minlength=1)
    bins = np.empty(len(lengths), dtype=np.int64)
    open_bins: dict[int, list[np.ndarray]] = {}  # by the room that is left
    rooms = 0  # bit r is set where there is an open bin of room r
    num_bins = at = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        items = order[at : at + int(counts[length])]
        at += len(items)
        while len(items):
            enough = rooms >> length
            if enough:
                room = length + (enough & -enough).bit_length() - 1  # the least that is enough
                here = open_bins[room].pop()
                if not open_bins[room]:
                    rooms ^= 1 << room
            else:
                room = capacity
                num_new = -(-len(items) // (room // length))
                here = np.arange(num_bins, num_bins + num_new)
                num_bins += num_new
            each = room // length
            now = items[: len(here) * each]
            items = items[len(now) :]
            num_full, rest = divmod(len(now), each)
            bins[now] = np.repeat(here[: num_full + (rest > 0)], each)[: len(now)]
            for left, those in (
                (room, here[num_full + (rest > 0) :]),
                (room - rest * length, here[num_full : num_full + (rest > 0)]),
                (room - each * length, here[:num_full]),
            ):
                if left and len(those):
                    open_bins.setdefault(left, []).append(those)
                    rooms |= 1 << left
    return bins


def iter_windows(lengths: Iterable[np.ndarray], block_size: int) -> Iterator[np.ndarray]:
    """The lengths of the documents of each window that has some, in order.

    Args:
        lengths: of all documents in order, in portions of any size.
    """
    size = max(WINDOW_TOKENS, MIN_WINDOW_BLOCKS * block_size)
    waiting, start = np.empty(0, dtype=np.int64), 0
    for portion in lengths:
        waiting = np.concatenate([waiting, portion.astype(np.int64)])
        while len(waiting):
            firsts = start + np.cumsum(waiting) - waiting
            num = int(np.searchsorted(firsts, (start // size + 1) * size))
            if num == len(waiting):
                break  # more may begin in it
            yield waiting[:num]
            waiting, start = waiting[num:], int(firsts[num])
    if len(waiting):
        yield waiting
