"""Units: what one worker encodes at a time.

In: the files of a source. Out: `Unit`s in reading order. Where one ends depends on the files and on UNIT_BYTES, never
on the number of workers; so the tokens in front of a unit, and with them every block, are the same however many work.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from data_prep.downloads import FILES_AHEAD, Downloads
from data_prep.readers import Piece
from data_prep.row_groups import ranges_of_groups, read_far_groups, read_groups, unreadable
from data_prep.sources import Source, SourceFile

UNIT_BYTES = 8_000_000  # a few seconds of work: what a kill loses, and how evenly the last units spread over workers
MOST_UNITS = 50_000  # of large corpora the units are larger: 60 TB in 7.5 million units would be 30 million files


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
        """The name of the unit's result: equal exactly when input and settings are.

        Args:
            identities: of the pieces' files.
        """
        parts = [
            [piece.file, identity, piece.format, piece.start, piece.end, piece.first_record]
            for piece, identity in zip(self.pieces, identities, strict=True)
        ]
        text = json.dumps([settings, self.source, self.split, parts], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def unit_size(files: list[tuple[int, SourceFile]]) -> int:
    """Bytes of input that a unit has about, of a preparation of these files."""
    return max(UNIT_BYTES, sum(file.size for _, file in files) // MOST_UNITS)


def iter_units(
    source: Source,
    number: int,
    files: list[tuple[int, SourceFile]],
    split: str,
    downloads: Downloads,
    unit_bytes: int,
) -> Iterator[Unit]:
    """The units of one split of a source, lazily, in source order. A Parquet file has to be here to be cut.

    Args:
        number: The source's number.
        files: The split's files with their numbers in documents/files.jsonl.
        unit_bytes: About so large is a unit.
    """
    is_stream = (source.entry.tokenized or "").startswith("stream") and any(file.format != "bin" for _, file in files)
    if source.entry.document_start is not None or is_stream:
        # Documents may go on from one file to the next: one worker reads them all, in order.
        pieces = tuple(Piece(index, downloads.path(index), file.format) for index, file in files)
        yield Unit(number, split, pieces, sum(file.size for _, file in files))
        return
    group: list[Piece] = []
    group_bytes = 0
    for position, (index, file) in enumerate(files):
        downloads.ahead(each for each, _ in files[position + 1 : position + 1 + FILES_AHEAD])
        path = downloads.path(index)
        if file.format in ("text", "python") and not source.is_split_by_line:
            group.append(Piece(index, path, file.format))
            group_bytes += file.size
            if group_bytes < unit_bytes:
                continue
        if group:
            yield Unit(number, split, tuple(group), group_bytes, len(group))
            group, group_bytes = [], 0
        if file.format == "parquet":
            yield from _cut_parquet(source, number, split, index, file, downloads, unit_bytes)
        elif file.format.endswith((".gz", ".zst")) or file.format == "arrow":
            yield Unit(number, split, (Piece(index, path, file.format),), file.size)
        elif file.format in ("jsonl", "bin") or source.is_split_by_line:
            yield from _cut_lines(number, split, index, file, path, unit_bytes)
    if group:
        yield Unit(number, split, tuple(group), group_bytes, len(group))


def _cut_lines(number: int, split: str, index: int, file: SourceFile, path: str, unit_bytes: int) -> Iterator[Unit]:
    for start in range(0, max(file.size, 1), unit_bytes):
        end = min(start + unit_bytes, file.size)
        yield Unit(number, split, (Piece(index, path, file.format, start, end),), end - start, continues_file=start > 0)


def _cut_parquet(
    source: Source, number: int, split: str, index: int, file: SourceFile, downloads: Downloads, unit_bytes: int
) -> Iterator[Unit]:
    import pyarrow as pa

    path = downloads.path(index)

    def read() -> list[tuple[int, int, int, int]]:
        if downloads.is_cut_from_afar and downloads.is_far(index):
            return read_far_groups(source, index, file, downloads)
        return read_groups(downloads.fetch(index), source)

    try:
        groups = downloads.remembered_groups(index, read)
    except (OSError, pa.ArrowException) as error:
        if source.entry.on_bad_record == "fail":
            raise unreadable(path, error) from error
        yield Unit(number, split, (Piece(index, path, "parquet"),), file.size)  # the reader counts it as one bad record
        return
    for first_group, end_group, first_row, rows, num_bytes in ranges_of_groups(groups, file.size, unit_bytes):
        yield Unit(number, split, (Piece(index, path, "parquet", first_group, end_group, first_row),), num_bytes, rows)
