"""Files into records: the text of each document, or what is wrong with it.

In: pieces of files. Out: `Record`s in order, one at a time, with nothing held but a few megabytes. A piece is a whole
file, a range of bytes of a text file read by line (the lines that start inside it), or a range of row groups of a
Parquet file.
"""

import codecs
import io
import json
import os
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from data_prep.buckets import Bucket, column_names
from data_prep.errors import UserError, did_you_mean

READ_BYTES = 2**20
MAX_DOCUMENT_BYTES = 2**30  # a document is encoded in one go, with about 100 bytes of memory per token
PARQUET_ROWS = 256


@dataclass(frozen=True)
class Piece:
    """A part of one file; `end` None means to its end. Offsets are bytes, or row groups for Parquet."""

    file: int  # its number in documents/files.jsonl
    path: str
    format: str
    start: int = 0
    end: int | None = None
    first_record: int = 0


@dataclass(frozen=True)
class Reading:
    """How records become documents; part of what a unit's result depends on."""

    text_column: str
    keep_columns: tuple[tuple[str, str], ...]  # name, type
    document_start: str | None
    is_split_by_line: bool
    buckets: tuple[Bucket, ...] = ()  # whose columns are among keep_columns
    tokenized: str | None = None  # one of catalog.TOKENIZED: text_column holds ids


@dataclass
class Record:
    """A document: `text`, or None and the `problem`; neither means a blank line, which only counts for later numbers.

    `number` counts from 0 at the start of the piece, plus the piece's `first_record`.
    """

    file: int
    number: int
    text: str | None
    problem: str | None = None
    kept: tuple[Any, ...] = ()
    ids: Any = None  # a NumPy array, of a document that is tokenized already


def read_records(pieces: tuple[Piece, ...], reading: Reading) -> Iterator[Record]:
    """The records of some pieces; problems are records too, so that the caller decides what they mean."""
    records = (record for piece in pieces for record in _read_piece(piece, reading))
    return records if reading.document_start is None else _join_records(records, re.compile(reading.document_start))


def _read_piece(piece: Piece, reading: Reading) -> Iterator[Record]:
    if os.path.getsize(piece.path) == 0:
        return iter([Record(piece.file, 0, "", "the file is empty", (None,) * len(reading.keep_columns))])
    if piece.format == "parquet":
        return _read_parquet(piece, reading)
    if piece.format.startswith("jsonl"):
        return _read_jsonl(piece, reading)
    if reading.is_split_by_line:
        return _read_text_lines(piece, len(reading.keep_columns))
    return _read_file(piece, len(reading.keep_columns))


def _read_file(piece: Piece, num_kept: int) -> Iterator[Record]:
    num_bytes = os.path.getsize(piece.path)
    if num_bytes > MAX_DOCUMENT_BYTES:
        text, problem = None, f"the file is one document and {_too_long(num_bytes)}; --split-lines makes each line one"
    else:
        with open(piece.path, "rb") as file:
            text, problem = _decode_file(file.read(), piece.format)
    yield Record(piece.file, 0, text, problem, (None,) * num_kept)


def _decode_file(data: bytes, format: str) -> tuple[str | None, str | None]:
    if b"\0" in data:
        return None, "the file is binary (it holds a zero byte), not text"
    encoding = "utf-8"
    if format == "python":  # PEP 263: a Python file says its own encoding
        try:
            declared = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
        except SyntaxError as error:
            return None, f"the file's coding line cannot be obeyed: {error}"
        encoding = (
            declared if codecs.lookup(declared).name != "utf-8-sig" else "utf-8"
        )  # keep the mark: it is text of the file
    try:
        return data.decode(encoding), None
    except UnicodeDecodeError as error:
        return (
            None,
            f"the file is not {encoding} (byte {error.start}: {error.reason}); convert it with `iconv -t utf-8`",
        )


def _read_text_lines(piece: Piece, num_kept: int) -> Iterator[Record]:
    for number, line in enumerate(_iter_lines(piece), start=piece.first_record):
        text, problem = _decode(line.removesuffix(b"\n").removesuffix(b"\r"))
        if text is not None and "\0" in text:
            text, problem = None, "the line is binary (it holds a zero byte), not text"
        elif len(line) > MAX_DOCUMENT_BYTES:
            text, problem = None, f"the line {_too_long(len(line))}"
        yield Record(piece.file, number, text, problem, (None,) * num_kept)


def _read_jsonl(piece: Piece, reading: Reading) -> Iterator[Record]:
    nothing = (None,) * len(reading.keep_columns)
    number = piece.first_record - 1
    try:
        for number, line in enumerate(_iter_lines(piece), start=piece.first_record):
            if not line.strip():
                yield Record(piece.file, number, None)
                continue
            row, problem = _parse_line(line)
            if problem is not None:
                yield Record(piece.file, number, None, problem, nothing)
                continue
            kept = tuple(as_type(row.get(name), kind) for name, kind in reading.keep_columns)
            if reading.text_column not in row:
                problem = f"there is no column {reading.text_column!r}; there are: {', '.join(map(repr, row))}"
                yield Record(piece.file, number, None, problem, kept)
            else:
                yield Record(piece.file, number, *_check_text(row[reading.text_column], reading.text_column), kept)
    except OSError as error:  # what pyarrow raises for a broken gzip or zstd stream
        yield Record(piece.file, number + 1, None, f"the rest of the file cannot be decompressed ({error})", nothing)


def _read_parquet(piece: Piece, reading: Reading) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    nothing = (None,) * len(reading.keep_columns)
    number = piece.first_record
    try:
        with pq.ParquetFile(piece.path) as file:
            check_parquet_column(file, piece.path, reading.text_column)
            for name in column_names(reading.buckets):
                if name not in file.schema_arrow.names:
                    raise UserError(
                        f"{piece.path}: the buckets are by column {name} but the file has no such column. "
                        f"{did_you_mean(name, file.schema_arrow.names)} Change the conditions."
                    )
            present = [name for name, _ in reading.keep_columns if name in file.schema_arrow.names]
            groups = list(range(piece.start, file.num_row_groups if piece.end is None else piece.end))
            columns = list(dict.fromkeys([reading.text_column, *present]))
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=columns, use_threads=False):
                kept = {name: batch.column(name).to_pylist() for name in present}
                texts = _check_column(batch.column(reading.text_column), reading.text_column)
                for row, (text, problem) in enumerate(texts):
                    values = tuple(
                        as_type(kept[k][row] if k in kept else None, kind) for k, kind in reading.keep_columns
                    )
                    yield Record(piece.file, number, text, problem, values)
                    number += 1
    except (OSError, pa.ArrowException) as error:
        yield Record(
            piece.file, number, None, f"the rest of the file cannot be read as Parquet ({one_line(error)})", nothing
        )


def check_parquet_column(file: Any, path: str, text_column: str) -> None:
    """Raise a UserError unless the Parquet file has the text column."""
    names = file.schema_arrow.names
    if text_column not in names:
        raise UserError(
            f"{path}: --text-column is {text_column} but the file has no such column. Its columns: {', '.join(names)}."
        )


def _join_records(records: Iterator[Record], start: re.Pattern) -> Iterator[Record]:
    """Records that are parts of documents, joined as they stand; one that matches `start` begins the next document."""
    parts: list[str] = []
    first: Record | None = None
    for record in records:
        if record.text is None:
            yield record
            continue
        if first is None or start.match(record.text):
            if first is not None:
                yield _join(first, parts)
            first, parts = record, []
        parts.append(record.text)
    if first is not None:
        yield _join(first, parts)


def _join(first: Record, parts: list[str]) -> Record:
    text, problem = "".join(parts), None
    if len(text) > MAX_DOCUMENT_BYTES // 4 and (num_bytes := len(text.encode())) > MAX_DOCUMENT_BYTES:
        text, problem = None, f"the document of {len(parts):,} records {_too_long(num_bytes)}"
    return Record(first.file, first.number, text, problem, first.kept)


def _too_long(num_bytes: int) -> str:
    """What is wrong with a document of so many bytes, more than can be encoded."""
    return (
        f"has {num_bytes:,} bytes but a document may have {MAX_DOCUMENT_BYTES:,} (1 GiB) at most, to fit into memory; "
        "cut it into several"
    )


def _iter_lines(piece: Piece) -> Iterator[bytes]:
    """The lines that start inside the piece, each with its line end."""
    compression = {"jsonl.gz": "gzip", "jsonl.zst": "zstd"}.get(piece.format)
    if compression is not None:
        import pyarrow as pa

        with pa.input_stream(piece.path, compression=compression, buffer_size=READ_BYTES) as stream:
            yield from io.BufferedReader(stream, READ_BYTES)
        return
    with open(piece.path, "rb", buffering=READ_BYTES) as file:
        position = 0
        if piece.start > 0:
            file.seek(piece.start - 1)
            position = piece.start - 1 + len(file.readline())  # the rest of a line that starts before us
        while piece.end is None or position < piece.end:
            line = file.readline()
            if not line:
                return
            position += len(line)
            yield line


def _parse_line(line: bytes) -> tuple[dict, str | None]:
    try:
        row = orjson.loads(line)
    except ValueError:  # NaN, half a surrogate pair, a byte order mark ...: the slow parser judges
        return _parse_line_slowly(line)
    return (row, None) if isinstance(row, dict) else _parse_line_slowly(line)


def _parse_line_slowly(line: bytes) -> tuple[dict, str | None]:
    text, problem = _decode(line)
    if problem is not None:
        return {}, problem
    try:
        row = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        return {}, f"the line is not JSON ({error})"
    return (
        (row, None)
        if isinstance(row, dict)
        else ({}, f"the line is a JSON {type(row).__name__}, not an object with columns")
    )


def _decode(data: bytes) -> tuple[str | None, str | None]:
    try:
        return data.decode(), None
    except UnicodeDecodeError as error:
        return None, f"the line is not UTF-8 (byte {error.start}: {error.reason})"


def _check_text(value: Any, column: str) -> tuple[str | None, str | None]:
    if value is None:
        return None, f"{column!r} is null"
    if not isinstance(value, str):
        return None, f"{column!r} is {json.dumps(value, default=str)[:60]}, a {type(value).__name__}, not text"
    try:
        if len(value) > MAX_DOCUMENT_BYTES // 4 and (num_bytes := len(value.encode())) > MAX_DOCUMENT_BYTES:
            return None, f"{column!r} {_too_long(num_bytes)}"
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        return None, f"{column!r} is no valid Unicode: half of a surrogate pair at character {error.start}"
    return value, None


def _check_column(column: Any, name: str) -> list[tuple[str | None, str | None]]:
    """Text or problem of each row; bytes that are no UTF-8 are found one by one."""
    try:
        return [_check_text(value, name) for value in column.to_pylist()]
    except UnicodeDecodeError:
        return [_check_scalar(value, name) for value in column]


def _check_scalar(value: Any, column: str) -> tuple[str | None, str | None]:
    try:
        return _check_text(value.as_py(), column)
    except UnicodeDecodeError as error:
        return None, f"{column!r} is not UTF-8 (byte {error.start}: {error.reason})"


def as_type(value: Any, kind: str) -> Any:
    """A kept value as its declared type; null where it is of another.

    A kept column is a courtesy, never a reason to stop.
    """
    if value is None or isinstance(value, bool):
        return None
    if kind == "string":
        return value.encode(errors="replace").decode() if isinstance(value, str) else None
    if kind == "int64":
        return value if isinstance(value, int) and -(2**63) <= value < 2**63 else None
    return float(value) if isinstance(value, int | float) else None


def one_line(error: BaseException) -> str:
    """An error's message without line ends."""
    return " ".join(str(error).split())[:200]
