"""The document map: which text lies at which token of a split.

Out of preparation come documents/<split>.arrow, one row per document in order, and documents/files.jsonl, one line per
source file. `documents_between` is the way back from tokens to text: the documents whose tokens fall into a range of
the stream, which is all documents one after the other. Where packing moved them (data_prep/pieces.py),
`DocumentMap.pieces` leads from positions in the blocks to documents, and `ranges` back.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.arrays import to_numpy
from data_prep.blocks import Blocks
from data_prep.errors import UserError
from data_prep.packing import CONCAT
from data_prep.paths import check_command
from data_prep.pieces import PieceMap, pieces_path

ROWS_PER_BATCH = 2**16
# 24 bytes a document; the kept columns come on top.
COLUMNS = [("first_token", pa.uint64()), ("source", pa.uint32()), ("record", pa.uint64()), ("num_bytes", pa.uint32())]


@dataclass(frozen=True)
class Document:
    """One document of a split: its tokens are [first_token, end_token) of the stream, its separators included."""

    number: int
    first_token: int
    end_token: int
    source: str  # the source's name and the file inside it
    record: int  # from 0: the line of a JSON lines file, the row of a Parquet file; 0 for a text file
    num_bytes: int
    columns: dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """What a range of positions in the blocks, [first_token, end_token), holds of one document."""

    document: Document
    first_token: int
    end_token: int
    offset: int  # tokens of the document in front of it

    @property
    def is_begun(self) -> bool:
        """Whether the document began earlier."""
        return self.offset > 0

    @property
    def goes_on(self) -> bool:
        """Whether the document has more tokens behind it."""
        num_here = self.end_token - self.first_token
        return self.offset + num_here < self.document.end_token - self.document.first_token


class DocumentMap:
    """The documents of one split, memory-mapped."""

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        blocks = Blocks(self.folder, split)
        self.num_tokens = blocks.manifest.splits[split].num_tokens
        self.num_positions = blocks.num_tokens
        path = map_path(self.folder, split)
        try:
            self.table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            self.files = [json.loads(line) for line in files_path(self.folder).read_text(encoding="utf-8").splitlines()]
            path = pieces_path(self.folder, split)
            self.piece_map = PieceMap(blocks) if blocks.is_padded else None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is missing or damaged: {error}. The text behind a token cannot be found. "
                f"{check_command(self.folder)} names every damaged file; then prepare the dataset again."
            ) from error
        self.first_tokens = self.table.column("first_token")
        starts = [chunk[0].as_py() for chunk in self.first_tokens.chunks]
        self._chunk_first_token = np.array(starts, dtype=np.uint64)
        self._chunk_first_row = np.cumsum([0, *(len(chunk) for chunk in self.first_tokens.chunks)])

    def __len__(self) -> int:
        return self.table.num_rows

    def number_at(self, token: int) -> int:
        """The number of the document that holds the token at position `token`."""
        chunk = int(np.searchsorted(self._chunk_first_token, np.uint64(token), side="right")) - 1
        inside = to_numpy(self.first_tokens.chunk(chunk))
        return int(self._chunk_first_row[chunk] + np.searchsorted(inside, np.uint64(token), side="right")) - 1

    def document(self, number: int) -> Document:
        """One document by its number in the split."""
        row = self.table.slice(number, 2).select(["first_token"]).column(0).to_pylist()
        values = self.table.slice(number, 1).to_pylist()[0]
        kept = {key: value for key, value in values.items() if key not in dict(COLUMNS)}
        file = self.files[values["source"]]
        end = row[1] if len(row) == 2 else self.num_tokens
        source = join_source(file["source"], file["name"])
        return Document(number, row[0], end, source, values["record"], values["num_bytes"], kept)

    def between(self, first_token: int, end_token: int) -> Iterator[Document]:
        """The documents with at least one token in [first_token, end_token), in order."""
        end_token = min(end_token, self.num_tokens)
        if len(self) == 0 or first_token >= end_token:
            return
        for number in range(self.number_at(max(first_token, 0)), self.number_at(end_token - 1) + 1):
            yield self.document(number)

    def pieces(self, first: int, end: int) -> Iterator[Piece]:
        """What the positions [first, end) of the blocks hold, in their order; padding is left out."""
        if self.piece_map is None:
            ranges = [(first, min(end, self.num_positions), first)]
        else:
            ranges = self.piece_map.pieces(first, end)
        for start, stop, token in ranges:
            for document in self.between(token, token + stop - start):
                begin = max(document.first_token, token)
                where = start + begin - token
                num_here = min(document.end_token, token + stop - start) - begin
                yield Piece(document, where, where + num_here, begin - document.first_token)

    def ranges(self, first_token: int, end_token: int) -> list[tuple[int, int]]:
        """Where the tokens [first_token, end_token) of the stream lie: (first, end) positions in the blocks, in order.

        What no block holds is left out.
        """
        if self.piece_map is not None:
            return list(self.piece_map.ranges(first_token, end_token))
        end = min(end_token, self.num_positions)
        return [(first_token, end)] if first_token < end else []

    def place_of(self, position: int) -> int:
        """The place in the stream of the token at a position of the blocks; not of padding."""
        return position if self.piece_map is None else self.piece_map.token_at(position)

    def position_after(self, position: int) -> int | None:
        """The position of the token that follows in the stream the one at a position; None behind the last block."""
        token = self.place_of(position) + 1
        return next((first for first, _ in self.ranges(token, token + 1)), None)


def count_cut(path: Path, num_tokens: int, block_size: int, packing: str) -> tuple[int, int]:
    """(documents that a border of blocks cuts, documents longer than a block), from a document map.

    Args:
        num_tokens: of the split, where its last document ends.
    """
    num_cut = num_long = 0
    with pa.memory_map(str(path)) as file:
        batches = (to_numpy(batch["first_token"]).astype(np.int64) for batch in pa.ipc.open_stream(file))
        for first, following in pairwise(chain(batches, [np.array([num_tokens])])):
            last = np.append(first[1:], following[0]) - 1
            is_long = last - first >= block_size
            num_long += int(is_long.sum())
            is_cut = is_long if packing != CONCAT else first // block_size != last // block_size
            num_cut += int(is_cut.sum())
    return num_cut, num_long


def documents_between(folder: str | Path, split: str, first_token: int, end_token: int) -> list[Document]:
    """The documents of a split with at least one token in [first_token, end_token), in order."""
    return list(DocumentMap(folder, split).between(first_token, end_token))


def join_source(source: str, name: str) -> str:
    """How people are told where a document is from: the source's name and the file inside it."""
    return source if name == source else f"{source}/{name}"


def map_path(folder: Path, split: str) -> Path:
    """Where the document map of a split lies."""
    return folder / "documents" / f"{split}.arrow"


def files_path(folder: Path) -> Path:
    """Where the list of source files lies: `source` of a document is a line number of it, from 0."""
    return folder / "documents" / "files.jsonl"


def map_schema(keep_columns: dict[str, str]) -> pa.Schema:
    """The columns of a document map with the kept columns of its sources."""
    return pa.schema([*COLUMNS, *((name, pa.type_for_alias(kind)) for name, kind in keep_columns.items())])
