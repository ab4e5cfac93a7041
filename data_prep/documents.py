"""The document map: which text lies at which token of a split.

Out of preparation come documents/<split>.arrow, one row per document in block order, and documents/files.jsonl, one
line per source file. `documents_between` is the way back from tokens to text: the documents whose tokens fall into a
range.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.errors import UserError
from data_prep.packing import CONCAT

ROWS_PER_BATCH = 2**16
# 24 bytes a document; the kept columns come on top.
COLUMNS = [("first_token", pa.uint64()), ("source", pa.uint32()), ("record", pa.uint64()), ("num_bytes", pa.uint32())]


@dataclass(frozen=True)
class Document:
    """One document of a split: its tokens are [first_token, end_token), its separators included."""

    number: int
    first_token: int
    end_token: int
    source: str  # the source's name and the file inside it
    record: int  # from 0: the line of a JSON lines file, the row of a Parquet file; 0 for a text file
    num_bytes: int
    columns: dict[str, Any]


class DocumentMap:
    """The documents of one split, memory-mapped."""

    def __init__(self, folder: str | Path, split: str):
        from data_prep.manifest import load_manifest

        self.folder, self.split = Path(folder), split
        self.num_tokens = load_manifest(self.folder).splits[split].num_tokens
        path = map_path(self.folder, split)
        try:
            self.table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            self.files = [json.loads(line) for line in files_path(self.folder).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is missing or damaged: {error}. The text behind a token cannot be found. "
                f"`make check DATASET={self.folder}` names every damaged file; then prepare the dataset again."
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
        inside = self.first_tokens.chunk(chunk).to_numpy(zero_copy_only=True)
        return int(self._chunk_first_row[chunk] + np.searchsorted(inside, np.uint64(token), side="right")) - 1

    def document(self, number: int) -> Document:
        """One document by its number in the split."""
        row = self.table.slice(number, 2).select(["first_token"]).column(0).to_pylist()
        values = self.table.slice(number, 1).to_pylist()[0]
        kept = {key: value for key, value in values.items() if key not in dict(COLUMNS)}
        file = self.files[values["source"]]
        end = row[1] if len(row) == 2 else self.num_tokens
        source = file["source"] if file["name"] == file["source"] else f"{file['source']}/{file['name']}"
        return Document(number, row[0], end, source, values["record"], values["num_bytes"], kept)

    def between(self, first_token: int, end_token: int) -> Iterator[Document]:
        """The documents with at least one token in [first_token, end_token), in order."""
        end_token = min(end_token, self.num_tokens)
        if len(self) == 0 or first_token >= end_token:
            return
        for number in range(self.number_at(max(first_token, 0)), self.number_at(end_token - 1) + 1):
            yield self.document(number)


def count_cut(path: Path, num_tokens: int, block_size: int, packing: str) -> tuple[int, int]:
    """(documents that a border of blocks cuts, documents longer than a block), from a document map.

    Args:
        num_tokens: of the split, where its last document ends.
    """
    num_cut = num_long = 0
    with pa.memory_map(str(path)) as file:
        firsts = [batch.column("first_token").to_numpy().astype(np.int64) for batch in pa.ipc.open_stream(file)]
    nexts = [each[0] for each in firsts[1:]] + [num_tokens]
    for first, following in zip(firsts, nexts, strict=True) if firsts else ():
        last = np.append(first[1:], following) - 1
        is_long = last - first >= block_size
        num_long += int(is_long.sum())
        is_cut = is_long if packing != CONCAT else first // block_size != last // block_size
        num_cut += int(is_cut.sum())
    return num_cut, num_long


def documents_between(folder: str | Path, split: str, first_token: int, end_token: int) -> list[Document]:
    """The documents of a split with at least one token in [first_token, end_token), in order."""
    return list(DocumentMap(folder, split).between(first_token, end_token))


def map_path(folder: Path, split: str) -> Path:
    """Where the document map of a split lies."""
    return folder / "documents" / f"{split}.arrow"


def files_path(folder: Path) -> Path:
    """Where the list of source files lies: `source` of a document is a line number of it, from 0."""
    return folder / "documents" / "files.jsonl"


def map_schema(keep_columns: dict[str, str]) -> pa.Schema:
    """The columns of a document map with the kept columns of its sources."""
    return pa.schema([*COLUMNS, *((name, pa.type_for_alias(kind)) for name, kind in keep_columns.items())])
