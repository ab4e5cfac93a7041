"""Where does a text stand in a prepared dataset? Exact bytes, read straight from the token ids.

In: the train blocks of a dataset, the bytes of every token, a text. Out: the tokens in which each occurrence begins and
ends. Nothing is decoded: which tokens can begin the text, and which can go on with it after k of its bytes, is worked
out once from the vocabulary, so that a block costs one table look-up per token.

    text "the cat"; tokens: "in" " the" " c" "at" "s"     " the" can begin it at byte 1, having given 3 of its 7 bytes;
                                                           then only " c" or " ca" ... can follow, and so on

An occurrence may cross rows, blocks and shards, and pieces of a document that packing put into different blocks. It
never crosses a control token: it lies within one document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.blocks import Blocks
from data_prep.documents import DocumentMap

_CHUNK = 1 << 20  # tokens looked at at once


@dataclass(frozen=True)
class Matches:
    """Occurrences in ascending order: int64 arrays of one length.

    `first` and `last` are the positions, in the split's blocks, of the tokens that hold the first and the last byte;
    `offset` is how many bytes of the first token come before it.
    """

    first: np.ndarray
    offset: np.ndarray
    last: np.ndarray


class TextPattern:
    """A text as the tokens of a vocabulary can spell it.

    Args:
        text: at least one byte.
        table: the bytes of each id; an empty entry is a control token, which no occurrence crosses.
    """

    def __init__(self, text: bytes, table: list[bytes]):
        assert text
        self.text = text
        self.table = table
        self.lengths = np.array([len(token) for token in table], dtype=np.int64)
        begins = [
            (id_, offset)
            for id_, token in enumerate(table)
            for offset in range(len(token))
            if _agree(token[offset:], text)
        ]
        self.begin_offsets = np.array([offset for _, offset in begins], dtype=np.int64)
        self.num_begins = np.bincount([id_ for id_, _ in begins], minlength=len(table))
        self.first_begin = np.cumsum(self.num_begins) - self.num_begins
        self.can_begin = self.num_begins > 0
        self._can_follow: dict[int, np.ndarray] = {}
        self._ids_of: dict[bytes, list[int]] = {}
        for id_, token in enumerate(table):
            self._ids_of.setdefault(token, []).append(id_)
        self._longest = max(map(len, table))

    def can_follow(self, num_given: int) -> np.ndarray:
        """For each id, whether it can stand where `num_given` bytes of the text have been given; bool (V,)."""
        if num_given not in self._can_follow:
            rest = self.text[num_given:]
            is_good = np.zeros(len(self.table), dtype=bool)
            for size in range(1, min(len(rest), self._longest) + 1):
                is_good[self._ids_of.get(rest[:size], [])] = True
            if len(rest) < self._longest:  # a token may give more than what is left of the text
                is_good[[id_ for id_, token in enumerate(self.table) if token.startswith(rest)]] = True
            self._can_follow[num_given] = is_good
        return self._can_follow[num_given]

    def find(
        self, blocks: Blocks, report: Callable[[int], None], documents: DocumentMap | None = None
    ) -> Iterator[Matches]:
        """Every occurrence in a split, overlapping ones too, a chunk at a time.

        Args:
            report: called with the number of tokens looked at since the last call.
            documents: finds where a document goes on whose pieces packing parted; without it none is found across.
        """
        for start, ids in _iter_chunks(blocks):
            num_tokens, at = len(ids), _text_at(blocks, np.flatnonzero(self.can_begin[ids]), start)
            ids = ids[at].astype(np.int64)
            times = self.num_begins[ids]
            ids, first = np.repeat(ids, times), np.repeat(at, times) + start
            which = np.arange(len(ids)) - np.repeat(np.cumsum(times) - times, times)
            offset = self.begin_offsets[self.first_begin[ids] + which]
            yield self._follow(blocks, documents, first, offset, self.lengths[ids] - offset)
            report(num_tokens)

    def _follow(
        self,
        blocks: Blocks,
        documents: DocumentMap | None,
        first: np.ndarray,
        offset: np.ndarray,
        given: np.ndarray,
    ) -> Matches:
        """Of the places where the text may begin, those where it goes on to its end."""
        last = first.copy()
        open_ = np.flatnonzero(given < len(self.text))
        while open_.size:
            following = _positions_after(blocks, documents, last[open_])
            is_good = following >= 0
            ids = np.zeros(len(open_), dtype=np.int64)
            ids[is_good] = blocks.token_at(following[is_good])
            for num_given in np.unique(given[open_]):
                here = given[open_] == num_given
                is_good[here] &= self.can_follow(int(num_given))[ids[here]]
            given[open_[~is_good]] = -1
            open_ = open_[is_good]
            given[open_] += self.lengths[ids[is_good]]
            last[open_] = following[is_good]
            open_ = open_[given[open_] < len(self.text)]
        is_found = given >= len(self.text)
        return Matches(first[is_found], offset[is_found], last[is_found])


def find_token(token: int, blocks: Blocks, report: Callable[[int], None]) -> Iterator[Matches]:
    """Every position of one token id, a chunk at a time; `report` as in TextPattern.find."""
    for start, ids in _iter_chunks(blocks):
        at = _text_at(blocks, np.flatnonzero(ids == token), start) + start
        yield Matches(at, np.zeros_like(at), at)
        report(len(ids))


def _positions_after(blocks: Blocks, documents: DocumentMap | None, positions: np.ndarray) -> np.ndarray:
    """Where the token after each of these stands, in its document; -1 where there is none."""
    after = positions + 1
    if not blocks.is_padded:
        return np.where(after < blocks.num_tokens, after, -1)
    block, offset = np.divmod(positions, blocks.block_size)
    at_end = np.flatnonzero(offset + 1 == blocks.lengths_of(block))
    found = [None if documents is None else documents.position_after(each) for each in positions[at_end].tolist()]
    after[at_end] = [-1 if each is None else each for each in found]
    return after


def _text_at(blocks: Blocks, at: np.ndarray, start: int) -> np.ndarray:
    """Those of the positions start + at that are no padding."""
    return at[blocks.is_text(at + start)] if blocks.is_padded else at


def _agree(token: bytes, text: bytes) -> bool:
    return token.startswith(text) if len(token) > len(text) else text.startswith(token)


def _iter_chunks(blocks: Blocks) -> Iterator[tuple[int, np.ndarray]]:
    """(position of the first, tokens): all tokens of a split, in pieces that do not cross a shard."""
    for shard in range(len(blocks.shard_starts) - 1):
        tokens = blocks.shard_tokens(shard)
        start = int(blocks.shard_starts[shard]) * blocks.block_size
        for i in range(0, len(tokens), _CHUNK):
            yield start + i, tokens[i : i + _CHUNK]
