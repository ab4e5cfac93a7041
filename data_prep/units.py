"""Units: what one worker encodes at a time.

In: the files of a source. Out: `Unit`s in reading order. Where one ends depends on the files and on UNIT_BYTES, never
on the number of workers; so the tokens in front of a unit, and with them every block, are the same however many work.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_prep.errors import UserError
from data_prep.readers import Piece, check_parquet_column
from data_prep.sources import Source, SourceFile

UNIT_BYTES = 8_000_000  # a few seconds of work: what a kill loses, and how evenly the last units spread over workers


@dataclass(frozen=True)
class Unit:
    """Consecutive pieces of one split of one source.

    `num_documents` is known before reading for text and Parquet files; with `continues_file` record numbers go on
    from the unit before.
    """

    source: int
    split: str
    pieces: tuple[Piece, ...]
    num_bytes: int  # of input, for the progress bar
    num_documents: int | None = None
    continues_file: bool = False

    def key(self, settings: dict, identities: list[str]) -> str:
        """The name of the unit's result: equal exactly when input and settings are."""
        parts = [
            [piece.file, identities[piece.file], piece.format, piece.start, piece.end, piece.first_record]
            for piece in self.pieces
        ]
        text = json.dumps([settings, self.source, self.split, parts], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def iter_units(
    source: Source, number: int, files: list[tuple[int, SourceFile]], split: str, fetch: Callable[[int], str]
) -> Iterator[Unit]:
    """The units of one split of a source, lazily: a file is fetched when its first unit is asked for.

    Args:
        number: The source's number.
        files: The split's files with their numbers in documents/files.jsonl.
        fetch: The local path of a file by that number; downloads it if need be.
    """
    if source.entry.document_start is not None:
        # Documents may go on from one file to the next: one worker reads them all, in order.
        pieces = tuple(Piece(index, fetch(index), file.format) for index, file in files)
        yield Unit(number, split, pieces, sum(file.size for _, file in files))
        return
    group: list[Piece] = []
    group_bytes = 0
    for index, file in files:
        if file.format in ("text", "python") and not source.is_split_by_line:
            group.append(Piece(index, fetch(index), file.format))
            group_bytes += file.size
            if group_bytes < UNIT_BYTES:
                continue
        if group:
            yield Unit(number, split, tuple(group), group_bytes, len(group))
            group, group_bytes = [], 0
        if file.format == "parquet":
            yield from _cut_parquet(source, number, split, index, file, fetch(index))
        elif file.format.endswith((".gz", ".zst")):
            yield Unit(number, split, (Piece(index, fetch(index), file.format),), file.size)
        elif file.format == "jsonl" or source.is_split_by_line:
            yield from _cut_lines(number, split, index, file, fetch(index))
    if group:
        yield Unit(number, split, tuple(group), group_bytes, len(group))


def _cut_lines(number: int, split: str, index: int, file: SourceFile, path: str) -> Iterator[Unit]:
    for start in range(0, max(file.size, 1), UNIT_BYTES):
        end = min(start + UNIT_BYTES, file.size)
        yield Unit(number, split, (Piece(index, path, file.format, start, end),), end - start, continues_file=start > 0)


def _cut_parquet(source: Source, number: int, split: str, index: int, file: SourceFile, path: str) -> Iterator[Unit]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as parquet:
            check_parquet_column(parquet, path, source.entry.text_column)
            metadata = parquet.metadata
            groups = [
                (metadata.row_group(i).num_rows, metadata.row_group(i).total_byte_size)
                for i in range(metadata.num_row_groups)
            ]
    except (OSError, pa.ArrowException) as error:
        if source.entry.on_bad_record == "fail":
            raise UserError(
                f"{path}: the Parquet file cannot be read ({' '.join(str(error).split())[:200]}). "
                "Replace or remove it, or leave such files out with --on-bad-record skip, which counts them."
            ) from error
        yield Unit(number, split, (Piece(index, path, "parquet"),), file.size)  # the reader counts it as one bad record
        return
    total_bytes = max(sum(size for _, size in groups), 1)
    first_group = first_row = rows = size = 0
    for group, (group_rows, group_bytes) in enumerate(groups, start=1):
        rows, size = rows + group_rows, size + group_bytes
        if size >= UNIT_BYTES or group == len(groups):
            piece = Piece(index, path, "parquet", first_group, group, first_row)
            yield Unit(number, split, (piece,), file.size * size // total_bytes, rows)
            first_group, first_row, rows, size = group, first_row + rows, 0, 0
