"""Token runs into packed blocks: what data_prep/align.py does for `concat`, for the other packings.

In: the runs of all units and their tables. Out: <split>/data-00000.arrow ..., <split>/lengths.npy (uint32, tokens of
each block without its padding) and documents/<split>-pieces.arrow (data_prep/pieces.py). Blocks are planned from the
lengths of documents, window after window; the tokens of a window are read when the first shard needs them, and runs are
deleted as soon as no later shard does. What an earlier attempt wrote stays: the plan is the same.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep import align
from data_prep.align import Taken, read_range, read_rows, write_dataset_files, write_shard
from data_prep.arrays import from_numpy, to_numpy
from data_prep.blocks import lengths_path
from data_prep.encode import run_name, run_path
from data_prep.filling import put_in_place
from data_prep.ledger import TRAIN, VALIDATION
from data_prep.manifest import ShardInfo, sha256_of
from data_prep.packing import Packed, iter_windows, pack
from data_prep.pieces import SCHEMA, pieces_path
from data_prep.progress import Progress

_TOKENS_AT_ONCE = 2**20  # copied: their indices stay in the cache


@dataclass(frozen=True)
class PackedSplit:
    """What was written of a split."""

    shards: tuple[ShardInfo, ...]
    num_padding_tokens: int
    lengths_sha256: str
    pieces_sha256: str


@dataclass
class _Window:
    packed: Packed
    first_token: int  # in the stream
    end_token: int
    first_block: int
    end_block: int
    tokens: np.ndarray | None = None  # while a shard needs them


@dataclass(frozen=True)
class _Shard:
    path: Path
    num_blocks: int
    blocks: np.ndarray | None  # (num_blocks, block_size); None where an earlier attempt wrote it
    end_token: int  # up to which no later shard needs the stream


def write_packed_split(
    folder: Path,
    work: Path,
    bucket: tuple[int, str],
    split: str,
    units: list[Taken],
    block_size: int,
    dtype: np.dtype,
    packing: str,
    fill: int,
    progress: Progress,
) -> PackedSplit:
    """All of a split but its document map.

    Args:
        bucket: number and name; 0 and "" where there are none.
        fill: the id that padding is written as; nobody reads it back as padding, which is found by the lengths.
    """
    run = run_name(bucket[1], split)
    starts = np.cumsum([0, *(unit.num_tokens[run] for unit in units)], dtype=np.int64)
    (folder / split).mkdir(exist_ok=True)
    pieces_path(folder, split).parent.mkdir(exist_ok=True)

    def read(first: int, end: int) -> np.ndarray:
        return read_range(work, run, units, starts, first, end, dtype)

    shards: list[ShardInfo] = []
    num_used = 0  # runs that no later shard needs
    lengths = _document_lengths(work, bucket[0], split, units)
    with _MapWriter(folder, split, block_size) as maps, ThreadPoolExecutor(1) as pool:
        windows = map(maps.add, _plan_windows(lengths, block_size, packing))
        writing: tuple[_Shard, Future[ShardInfo]] | None = None
        for shard in chain(_fill_shards(folder / split, windows, block_size, dtype, fill, read), [None]):
            if writing is not None:  # it was written while this one was filled
                shards.append(writing[1].result())
                progress.add_input(shards[-1].num_bytes, writing[0].blocks is None)
                while num_used < len(units) and starts[num_used + 1] <= writing[0].end_token:
                    run_path(work, units[num_used].key, run).unlink(missing_ok=True)
                    num_used += 1
            writing = None if shard is None else (shard, pool.submit(_write, shard, split, block_size))
    write_dataset_files(folder / split, split, shards, block_size, dtype)
    num_padding = maps.num_blocks * block_size - maps.num_tokens
    return PackedSplit(tuple(shards), num_padding, *(sha256_of(path) for path in maps.paths))


def _fill_shards(
    folder: Path,
    windows: Iterator[_Window],
    block_size: int,
    dtype: np.dtype,
    fill: int,
    read: Callable[[int, int], np.ndarray],
) -> Iterator[_Shard]:
    """Shards of SHARD_TOKENS // block_size blocks, the last one the rest; one without blocks where there are none."""
    rows_per_shard = max(align.SHARD_TOKENS // block_size, 1)
    waiting: deque[_Window] = deque()  # planned, and not all in shards
    end_token = end_block = 0  # of what is planned
    for number in count():
        first = number * rows_per_shard
        while end_block < first + rows_per_shard and (window := next(windows, None)) is not None:
            waiting.append(window)
            end_token, end_block = window.end_token, window.end_block
        end = min(first + rows_per_shard, end_block)
        if end <= first and number:
            return
        path, blocks = folder / f"data-{number:05d}.arrow", None
        if not path.exists():
            blocks = np.full((end - first, block_size), fill, dtype=dtype)
            for window in waiting:
                if window.tokens is None:
                    window.tokens = read(window.first_token, window.end_token)
                _fill_blocks(blocks, window, first)
                if window.end_block <= end:
                    window.tokens = None
        while waiting and waiting[0].end_block <= end:
            waiting.popleft()
        yield _Shard(path, end - first, blocks, waiting[0].first_token if waiting else end_token)


def _write(shard: _Shard, split: str, block_size: int) -> ShardInfo:
    if shard.blocks is not None:
        write_shard(shard.path, shard.blocks.reshape(-1), block_size)
    size = shard.path.stat().st_size
    return ShardInfo(f"{split}/{shard.path.name}", shard.num_blocks, size, sha256_of(shard.path))


class _MapWriter:
    """Writes lengths.npy and the piece map while blocks are planned; both are in place when it is left."""

    def __init__(self, folder: Path, split: str, block_size: int):
        self.paths = lengths_path(folder, split), pieces_path(folder, split)
        self.block_size = block_size
        self.num_blocks = self.num_tokens = 0

    def __enter__(self) -> "_MapWriter":
        with ExitStack() as stack:
            self._files = [stack.enter_context(open(path.with_suffix(".tmp"), "wb")) for path in self.paths]
            self._stack = stack.pop_all()
        self._begin = self._write_header()
        self._pieces = pa.ipc.new_stream(self._files[1], SCHEMA)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._pieces.close()
        self._files[0].seek(0)
        # NumPy leaves room in the header for a number of any size, so that it can be put in afterwards
        assert self._write_header() == self._begin
        self._stack.close()
        for path in self.paths if kind is None else ():
            put_in_place(path.with_suffix(".tmp"), path)

    def add(self, window: _Window) -> _Window:
        """Note a planned window; it comes back."""
        lengths = window.packed.block_lengths
        self.num_blocks += len(lengths)
        self.num_tokens += int(lengths.sum())
        self._files[0].write(lengths.astype("<u4").data)
        position = (window.packed.block + window.first_block) * self.block_size + window.packed.offset
        columns = (position, window.packed.first + window.first_token)
        arrays = [from_numpy(each.astype(np.uint64)) for each in columns]
        self._pieces.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        return window

    def _write_header(self) -> int:
        shape = {"descr": "<u4", "fortran_order": False, "shape": (self.num_blocks,)}
        np.lib.format.write_array_header_1_0(self._files[0], shape)
        return self._files[0].tell()


def _plan_windows(lengths: Iterator[np.ndarray], block_size: int, packing: str) -> Iterator[_Window]:
    first_token = first_block = 0
    for documents in iter_windows(lengths, block_size):
        packed = pack(documents, block_size, packing)
        end_token, end_block = first_token + int(documents.sum()), first_block + int(packed.block[-1]) + 1
        yield _Window(packed, first_token, end_token, first_block, end_block)
        first_token, first_block = end_token, end_block


def _document_lengths(work: Path, bucket: int, split: str, units: list[Taken]) -> Iterator[np.ndarray]:
    """Tokens of each document of a split, unit by unit."""
    for unit in units:
        rows = read_rows(work, unit.key).slice(0, unit.num_rows)
        is_here = to_numpy(rows["status"]) == (TRAIN if split == "train" else VALIDATION)
        is_here &= to_numpy(rows["bucket"]) == bucket
        yield to_numpy(rows["num_tokens"])[is_here]


def _fill_blocks(out: np.ndarray, window: _Window, first: int) -> None:
    """Copy what a window gives to the blocks of a shard, which begins with block `first`, into (rows, block_size)."""
    here, lengths = window.packed, window.packed.block_lengths
    begin = max(first - window.first_block, 0)  # blocks of the window
    end = min(first + len(out) - window.first_block, len(lengths))
    if begin >= end:
        return
    pieces = slice(*np.searchsorted(here.block, [begin, end]))
    rows = out[begin + window.first_block - first : end + window.first_block - first]
    tokens = _gather(window.tokens, here.first[pieces], here.length[pieces])
    rows[np.arange(out.shape[1]) < lengths[begin:end, None]] = tokens


def _gather(tokens: np.ndarray, first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """tokens[first[0] : first[0] + length[0]], and so on, one after the other.

    By an index for each token, many at once: a slice for each piece takes longer where documents are short.
    """
    ends = np.cumsum(length)
    out = np.empty(ends[-1], dtype=tokens.dtype)
    shift = first - (ends - length)
    done = 0
    while done < len(first):
        at = int(ends[done] - length[done])
        num = max(int(np.searchsorted(ends, at + _TOKENS_AT_ONCE)), done + 1)
        index = np.arange(at, ends[num - 1])
        index += np.repeat(shift[done:num], length[done:num])
        np.take(tokens, index, out=out[at : ends[num - 1]], mode="clip")  # "raise" would copy to a buffer first
        done = num
    return out
