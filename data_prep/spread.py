"""`sample: spread`: the units of a source in an order that is drawn, so that a cap takes from all of its files.

In: the files of a source. Out: its units, ordered by the hash of the file's name and their place in it: the same for
everybody, whatever the number of workers, and for a larger cap the same ones and more. Of Parquet files that lie
elsewhere only the footers and the row groups that the cap needs are read; of other files that lie elsewhere, whole
files.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from data_prep import units as units_module
from data_prep.downloads import FILES_AHEAD, Downloads
from data_prep.errors import UserError
from data_prep.readers import READ_BYTES, Piece
from data_prep.row_groups import ranges_of_groups, read_far_groups, unreadable
from data_prep.sources import Source, SourceFile
from data_prep.units import Unit, iter_units

MOST_FOOTERS = 64  # of files are looked at for a sample: each is a request


def iter_spread_units(
    source: Source, number: int, files: list[tuple[int, SourceFile]], downloads: Downloads, unit_bytes: int
) -> Iterator[Unit]:
    """All train units of a source, in the order of their hashes.

    Raises:
        UserError: documents go over the borders of files, so that no part of them can be taken alone.
    """
    if source.entry.document_start is not None or source.entry.tokenized is not None:
        raise UserError(
            f"{source.label}: sample is spread but its documents are joined from records in a row, or ids already. "
            "Take it in its order: --sample first."
        )
    units = []
    for index, file in files:
        if file.format == "parquet" and downloads.is_far(index):
            units += _cut_far_parquet(source, number, index, file, downloads, unit_bytes)
        elif downloads.is_remote(index) and file.format == "jsonl":
            units.append(Unit(number, "train", (Piece(index, downloads.path(index), file.format),), file.size))
        else:
            cut = list(iter_units(source, number, [(index, file)], "train", downloads, unit_bytes))
            units += _with_first_lines(cut) if len(cut) > 1 and cut[1].continues_file else cut
    names = dict(files)
    units.sort(key=lambda unit: _rank(names[unit.pieces[0].file].name, unit.pieces[0].start))
    for position, unit in enumerate(units):
        soon = units[position + 1 : position + 1 + FILES_AHEAD]
        downloads.pieces_ahead(piece for each in soon for piece in each.pieces if piece.format == "parquet")
        yield unit


def sample_units(
    source: Source,
    number: int,
    files: list[tuple[int, SourceFile]],
    downloads: Downloads,
    num_bytes: int,
    draw: Callable[[str], int],
) -> list[Unit]:
    """Train units of a source for a sample of so many bytes, which `Downloads.fetch_unit` brings here.

    All of them where the files lie here, or are not more than the sample. Of others the row groups of MOST_FOOTERS
    Parquet files, or as many other files as hold so much.

    Args:
        draw: a file's place in the order in which they are taken, by its name.
    """
    unit_bytes = units_module.UNIT_BYTES
    is_little = sum(file.size for index, file in files if downloads.is_far(index)) <= num_bytes
    if is_little or source.entry.document_start is not None:
        return list(iter_units(source, number, files, "train", downloads, unit_bytes))
    drawn = sorted(files, key=lambda item: draw(item[1].name))
    parquet = [item for item in drawn if item[1].format == "parquet" and downloads.is_far(item[0])]
    units = []
    for index, file in sorted(parquet[:MOST_FOOTERS], key=lambda item: item[0]):
        units += _cut_far_parquet(source, number, index, file, downloads, unit_bytes)
    others, size = [], 0
    for index, file in drawn:
        is_part = file.format == "parquet" and downloads.is_far(index)
        if not is_part and size < num_bytes:
            others.append((index, file))
            size += file.size
    return units + list(
        iter_units(source, number, sorted(others, key=lambda item: item[0]), "train", downloads, unit_bytes)
    )


def _rank(name: str, start: int) -> bytes:
    return hashlib.blake2b(f"{name}\0{start}".encode(), digest_size=16).digest()


def _cut_far_parquet(
    source: Source, number: int, index: int, file: SourceFile, downloads: Downloads, unit_bytes: int
) -> Iterator[Unit]:
    import pyarrow as pa

    try:
        groups = downloads.remembered_groups(index, lambda: read_far_groups(source, index, file, downloads))
    except (OSError, pa.ArrowException) as error:
        raise unreadable(f"{source.label}: {file.name}", error) from error
    for start, end, first_row, rows, num_bytes in ranges_of_groups(groups, file.size, unit_bytes):
        piece = Piece(index, downloads.groups_path(index, start, end), "parquet", start, end, first_row)
        yield Unit(number, "train", (piece,), num_bytes, rows)


def _with_first_lines(units: list[Unit]) -> list[Unit]:
    """Byte ranges of a file with the number of each one's first line, which reading it alone does not tell."""
    piece = units[0].pieces[0]
    starts = [unit.pieces[0].start for unit in units]
    num_before = [0] * len(starts)  # lines that begin in front of each range
    with open(piece.path, "rb") as file:
        position, lines, at = 0, 1, 1
        while at < len(starts):
            border = starts[at] - 1  # a line that begins at the border itself belongs to the range
            data = file.read(min(READ_BYTES, border - position))
            lines += int(np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n")))
            position += len(data)
            if position == border or not data:
                num_before[at] = lines
                at += 1
    return [
        replace(
            unit,
            pieces=(replace(unit.pieces[0], first_record=before),),
            continues_file=False,
        )
        for unit, before in zip(units, num_before, strict=True)
    ]
