"""The row groups of Parquet files: what they hold, and where in the file they lie.

In: a Parquet file that lies here, or elsewhere, of which only the end is read then. Out: its row groups, and
consecutive ones put together to units.
"""

import struct
from collections.abc import Iterator
from typing import Any

from data_prep.downloads import Downloads
from data_prep.errors import UserError
from data_prep.readers import check_parquet_column
from data_prep.sources import Source, SourceFile
from data_prep.urls import read_range

FOOTER_BYTES = 2**16  # read at first; a footer that is longer takes a second request


def ranges_of_groups(
    groups: list[tuple[int, int, int, int]], file_size: int, unit_bytes: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """Consecutive row groups of a unit each: first group, end group, first row, rows, share of the file's bytes."""
    total_bytes = max(sum(size for _, size, *_ in groups), 1)
    first_group = first_row = rows = size = 0
    for group, (group_rows, group_bytes, *_) in enumerate(groups, start=1):
        rows, size = rows + group_rows, size + group_bytes
        if size >= unit_bytes or group == len(groups):
            yield first_group, group, first_row, rows, file_size * size // total_bytes
            first_group, first_row, rows, size = group, first_row + rows, 0, 0


def read_groups(path: object, source: Source) -> list[tuple[int, int, int, int]]:
    """Of each row group of a Parquet file (or its footer): rows, bytes of data, where in the file it begins and ends.

    Raises:
        UserError: the file has no column with the text.
        OSError, pa.ArrowException: it cannot be read.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as parquet:
        check_parquet_column(parquet, str(path), source.entry.text_column)
        metadata = parquet.metadata
        groups = []
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            columns = [group.column(c) for c in range(group.num_columns)]
            starts = [c.dictionary_page_offset or c.data_page_offset for c in columns]
            ends = [start + c.total_compressed_size for start, c in zip(starts, columns, strict=True)]
            groups.append((group.num_rows, group.total_byte_size, min(starts, default=0), max(ends, default=0)))
    return groups


def read_far_groups(source: Source, index: int, file: SourceFile, downloads: Downloads) -> list[Any]:
    """`read_groups` of a file that lies elsewhere, from its footer."""
    import pyarrow as pa

    system, path = downloads.range_reader(index)
    what = f"{source.label}: {file.name}"
    tail = read_range(system, path, max(file.size - FOOTER_BYTES, 0), file.size, what, size=file.size)
    if len(tail) >= 8 and tail[-4:] == b"PAR1":
        length = struct.unpack("<I", tail[-8:-4])[0] + 8
        if FOOTER_BYTES < length < file.size:
            tail = read_range(system, path, file.size - length, file.size, what, size=file.size)
        tail = tail[-length:]
    downloads.folder.mkdir(parents=True, exist_ok=True)
    downloads.footer_path(index).write_bytes(tail)
    return read_groups(pa.BufferReader(tail), source)


def unreadable(path: str, error: BaseException) -> UserError:
    """The message for a broken Parquet file."""
    return UserError(
        f"{path}: the Parquet file cannot be read ({' '.join(str(error).split())[:200]}). "
        "Replace or remove it, or leave such files out with --on-bad-record skip, which counts them."
    )
