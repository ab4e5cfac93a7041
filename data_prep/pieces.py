"""The piece map of a packed split: where in the blocks the tokens of the documents lie.

There are two ways to count the tokens of a split. The *stream* is its documents one after the other, in which the
document map counts. A *position* is block x block_size + offset, in which blocks are read. Where blocks are filled in
order (`concat`) both are the same; where documents are packed, documents/<split>-pieces.arrow leads from one to the
other. It has a row for each piece in block order, and a record batch for each window of documents that were packed
together, whose first row is the window's first token both in the stream and in the blocks.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.arrays import to_numpy
from data_prep.blocks import Blocks

SCHEMA = pa.schema([("position", pa.uint64()), ("first_token", pa.uint64())])
_WINDOWS_KEPT = 4


def pieces_path(folder: Path, split: str) -> Path:
    """Where the piece map of a split lies; not there for `concat`."""
    return folder / "documents" / f"{split}-pieces.arrow"


class PieceMap:
    """The pieces of one split, memory-mapped. `ranges` and `pieces` give (first, end) pairs.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """

    def __init__(self, blocks: Blocks):
        self.blocks = blocks
        table = pa.ipc.open_stream(pa.memory_map(str(pieces_path(blocks.folder, blocks.split)))).read_all()
        if table.schema != SCHEMA:
            raise ValueError("it is no piece map")
        self._windows = [batch for batch in table.to_batches() if len(batch)]
        firsts = [[int(batch[name][0].as_py()) for batch in self._windows] for name in SCHEMA.names]
        self._window_position, self._window_token = (np.array(each, dtype=np.int64) for each in firsts)
        self._load = lru_cache(_WINDOWS_KEPT)(self._load_window)

    def windows(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(position, first token in the stream, tokens) of the pieces of each window, in block order; int64."""
        for number in range(len(self._windows)):
            yield self._load_window(number)[:3]

    def pieces(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(first position, end position, first token in the stream) of what the positions [first, end) hold."""
        number = max(int(np.searchsorted(self._window_position, first, side="right")) - 1, 0)
        while number < len(self._windows) and self._window_position[number] < end:
            position, token, length, _ = self._load(number)
            at = max(int(np.searchsorted(position, first, side="right")) - 1, 0)
            for i in range(at, int(np.searchsorted(position, end))):
                start, stop = max(int(position[i]), first), min(int(position[i] + length[i]), end)
                if start < stop:
                    yield start, stop, int(token[i]) + start - int(position[i])
            number += 1

    def ranges(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges of positions of the tokens [first, end) of the stream, in its order."""
        number = max(int(np.searchsorted(self._window_token, first, side="right")) - 1, 0)
        while number < len(self._windows) and self._window_token[number] < end:
            position, token, length, order = self._load(number)
            sorted_token = token[order]
            at = max(int(np.searchsorted(sorted_token, first, side="right")) - 1, 0)
            for i in order[at : int(np.searchsorted(sorted_token, end))].tolist():
                start, stop = max(int(token[i]), first), min(int(token[i] + length[i]), end)
                if start < stop:
                    yield int(position[i]) + start - int(token[i]), int(position[i]) + stop - int(token[i])
            number += 1

    def token_at(self, position: int) -> int:
        """The place in the stream of the token at a position.

        Raises:
            IndexError: there is padding.
        """
        for _, _, token in self.pieces(position, position + 1):
            return token
        raise IndexError(f"{self.blocks.folder}/{self.blocks.split}: position {position} is padding")

    def _load_window(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        batch = self._windows[number]
        position, token = (to_numpy(batch[name]).astype(np.int64) for name in SCHEMA.names)
        block = position // self.blocks.block_size
        ends = block * self.blocks.block_size + self.blocks.lengths_of(block)  # of the blocks' text
        is_followed = block[:-1] == block[1:]
        ends[:-1][is_followed] = position[1:][is_followed]
        return position, token, ends - position, np.argsort(token, kind="stable")
