"""Datasets that are tokenized already: ids in, documents out.

In: a column of lists of ids (Parquet, Arrow), or nanoGPT's .bin (uint16 or uint32, nothing else). Out: `Record`s that
carry their ids, and the text that these stand for, by which validation, filters and counts go on as for text. What the
ids mean is said with `--tokenized`:

    documents   a row is a document; an EOS at its end is its separator, one inside ends a document there too
    stream      rows (of all files) or the ids of a .bin are one stream, cut into documents at each EOS

Worked example, EOS 1, vocabulary 300: the stream `7 8 1 9 | 9 1 4` (a row ends at |) is the documents `7 8`, `9 9` and
`4`; as documents, the rows are `7 8`, `9`, `9` and `4`. EOS is written behind each document, also the last; BOS in
front where the tokenizer writes it, whether or not it stood there.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.manifest import TokenizerInfo, token_dtype
from data_prep.readers import MAX_DOCUMENT_BYTES, Piece, Reading, Record, as_type, check_parquet_column, one_line
from data_prep.token_bytes import backend_token_bytes
from data_prep.tokenizer_folder import load_backend

ROWS = 256
SEARCH_IDS = 2**20
LLM_C_MAGIC = (20240520, 20240801)


def read_tokenized(
    pieces: tuple[Piece, ...], reading: Reading, tokenizer: TokenizerInfo, folder: Path
) -> Iterator[Record]:
    """The documents of some pieces, with their ids and without separators."""
    to_documents = _Documents(reading, tokenizer, folder)
    if pieces[0].format == "bin":
        for piece in pieces:
            yield from _read_bin(piece, to_documents, bin_dtype(reading.tokenized, tokenizer.vocab_size))
    elif reading.tokenized == "documents":
        for piece in pieces:
            for number, ids, kept in _iter_rows(piece, reading):
                if isinstance(ids, str):
                    yield Record(piece.file, number, None, ids, kept)
                    continue
                ends = np.flatnonzero(ids == tokenizer.eos_token_id)
                for part in np.split(ids, ends + 1)[: len(ends) + (not len(ends) or ends[-1] + 1 < len(ids))]:
                    yield to_documents.make(piece.file, number, part, kept)
    else:
        yield from _read_stream(pieces, reading, to_documents)


def bin_dtype(kind: str, vocab_size: int) -> np.dtype:
    """How the ids of a .bin are written: as said, else as small as the vocabulary allows."""
    said = kind.partition(":")[2]
    return np.dtype(said) if said else token_dtype(vocab_size)


def join_ids(records: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of documents, one after the other (uint32), and the number of ids of each, as an encoder gives them."""
    ids = np.concatenate([record.ids for record in records]).astype(np.uint32)
    return ids, np.array([len(record.ids) for record in records], dtype=np.int64)


class _Documents:
    """Ids between two separators into a record."""

    def __init__(self, reading: Reading, tokenizer: TokenizerInfo, folder: Path):
        self.column, self.num_kept, self.tokenizer = reading.text_column, len(reading.keep_columns), tokenizer
        self.table = _load_bytes(folder, tokenizer)

    def make(self, file: int, number: int, ids: np.ndarray, kept: tuple[Any, ...] | None = None) -> Record:
        """A record of these ids, an EOS at the end and a BOS in front taken off."""
        kept = (None,) * self.num_kept if kept is None else kept
        known = self.tokenizer
        if len(ids) and ids[-1] == known.eos_token_id:
            ids = ids[:-1]
        if known.is_bos_written and len(ids) and ids[0] == known.bos_token_id:
            ids = ids[1:]
        problem = self._problem(ids)
        if problem is not None:
            return Record(file, number, None, problem, kept)
        text = b"".join([self.table[i] for i in ids.tolist()]).decode("utf-8", "replace")
        return Record(file, number, text, None, kept, ids)

    def _problem(self, ids: np.ndarray) -> str | None:
        if not len(ids):
            return None
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest >= self.tokenizer.vocab_size:
            wrong = smallest if smallest < 0 else largest
            return (
                f"the document holds the id {wrong} but the vocabulary of --tokenizer has "
                f"{self.tokenizer.vocab_size:,} entries; it was made with another tokenizer, "
                "or written with another size of integers"
            )
        if self.tokenizer.is_bos_written and (ids == self.tokenizer.bos_token_id).any():
            return (
                "the document holds BOS in its middle, so it is more than one document without EOS between them; "
                f"write EOS (id {self.tokenizer.eos_token_id}) behind each"
            )
        return "the document is longer than 2**28 tokens" if len(ids) > MAX_DOCUMENT_BYTES // 4 else None


def _read_bin(piece: Piece, to_documents: _Documents, dtype: np.dtype) -> Iterator[Record]:
    """The documents that begin inside the piece."""
    num_bytes = Path(piece.path).stat().st_size
    problem = _bin_problem(piece.path, num_bytes, dtype)
    if problem is not None:
        yield Record(piece.file, 0, None, problem, (None,) * to_documents.num_kept)
        return
    all_ids = np.memmap(piece.path, dtype=dtype, mode="r")
    eos = to_documents.tokenizer.eos_token_id
    start = -(-piece.start // dtype.itemsize)
    limit = len(all_ids) if piece.end is None else min(-(-piece.end // dtype.itemsize), len(all_ids))
    if start > 0:
        start = _next_eos(all_ids, start - 1, eos) + 1
    number = piece.first_record
    while start < limit:
        end = min(_next_eos(all_ids, start, eos) + 1, len(all_ids))
        yield to_documents.make(piece.file, number, np.array(all_ids[start:end]))
        start, number = end, number + 1


def _next_eos(ids: np.ndarray, start: int, eos: int) -> int:
    """The position of the first EOS from `start` on; the length where there is none."""
    num_searched = 1024
    while start < len(ids):
        found = np.flatnonzero(ids[start : start + num_searched] == eos)
        if len(found):
            return start + int(found[0])
        start, num_searched = start + num_searched, min(num_searched * 4, SEARCH_IDS)
    return len(ids)


def _bin_problem(path: str, num_bytes: int, dtype: np.dtype) -> str | None:
    if num_bytes == 0:
        return "the file is empty"
    if num_bytes % dtype.itemsize:
        return f"the file has {num_bytes:,} bytes, which is no whole number of {dtype} ids"
    head = np.fromfile(path, dtype=np.uint32, count=4096)
    if len(head) and int(head[0]) in LLM_C_MAGIC:
        return "the file begins with llm.c's header of 1,024 bytes; cut it off: tail -c +1025 x.bin > y.bin"
    if dtype == np.uint16 and len(head) >= 16 and num_bytes % 4 == 0 and (head < 2**16).all():
        return (
            "the file looks like uint32 (every other 16 bits are 0) and is read as uint16; say which it is: "
            "--tokenized stream:uint32"
        )
    return None


def _read_stream(pieces: tuple[Piece, ...], reading: Reading, to_documents: _Documents) -> Iterator[Record]:
    parts: list[np.ndarray] = []
    where: tuple[int, int, tuple[Any, ...]] | None = None  # file, row and columns of the document's beginning
    for piece in pieces:
        for number, ids, kept in _iter_rows(piece, reading):
            if isinstance(ids, str):
                yield Record(piece.file, number, None, ids, kept)
                continue
            start = 0
            for end in np.flatnonzero(ids == to_documents.tokenizer.eos_token_id):
                parts.append(ids[start : end + 1])
                file, row, columns = where or (piece.file, number, kept)
                yield to_documents.make(file, row, np.concatenate(parts), columns)
                parts, where, start = [], None, int(end) + 1
            if start < len(ids):
                where = where or (piece.file, number, kept)
                parts.append(ids[start:])
    if where is not None:
        yield to_documents.make(where[0], where[1], np.concatenate(parts), where[2])


def _iter_rows(piece: Piece, reading: Reading) -> Iterator[tuple[int, np.ndarray | str, tuple[Any, ...]]]:
    """Row number, its ids or what is wrong with them, and its kept columns."""
    import pyarrow as pa

    nothing = (None,) * len(reading.keep_columns)
    number = piece.first_record
    try:
        for batch in _iter_batches(piece, reading.text_column, [name for name, _ in reading.keep_columns]):
            columns = [
                batch.column(name).to_pylist() if name in batch.schema.names else [None] * len(batch)
                for name, _ in reading.keep_columns
            ]
            for row, ids in enumerate(_lists(batch.column(reading.text_column), reading.text_column)):
                values = zip(columns, reading.keep_columns, strict=True)
                yield number, ids, tuple(as_type(column[row], kind) for column, (_, kind) in values)
                number += 1
    except (OSError, pa.ArrowException) as error:
        yield number, f"the rest of the file cannot be read ({one_line(error)})", nothing


def _iter_batches(piece: Piece, column: str, keep: list[str]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if piece.format == "parquet":
        with pq.ParquetFile(piece.path) as file:
            check_parquet_column(file, piece.path, column)
            names = list(dict.fromkeys([column, *(name for name in keep if name in file.schema_arrow.names)]))
            groups = list(range(piece.start, file.num_row_groups if piece.end is None else piece.end))
            yield from file.iter_batches(ROWS, row_groups=groups, columns=names, use_threads=False)
        return
    with pa.memory_map(piece.path) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        reader = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
        if column not in reader.schema.names:
            raise UserError(
                f"{piece.path}: --text-column is {column} but the file has no such column. Its columns: "
                f"{', '.join(reader.schema.names)}."
            )
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            for start in range(0, len(batch), ROWS):
                yield batch.slice(start, ROWS)


def _lists(column: Any, name: str) -> Iterator[np.ndarray | str]:
    import pyarrow as pa

    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    is_list = is_list or pa.types.is_fixed_size_list(column.type)
    if not is_list or not pa.types.is_integer(column.type.value_type):
        raise UserError(
            f"--tokenized: column {name} holds {column.type}, not lists of ids. Name another: --text-column."
        )
    for value in column:
        if not value.is_valid:
            yield f"{name!r} is null"
        elif value.values.null_count:
            yield f"{name!r} holds a null among its ids"
        else:
            yield value.values.to_numpy(zero_copy_only=False)


@lru_cache(maxsize=1)
def _load_bytes(folder: Path, tokenizer: TokenizerInfo) -> list[bytes]:
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    control = {id_ for id_ in known if id_ is not None}
    return backend_token_bytes(load_backend(folder), control, tokenizer.vocab_size, str(folder))
