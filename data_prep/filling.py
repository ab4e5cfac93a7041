"""One shard, filled from token runs, each of which is deleted as soon as its tokens are safe in the shard.

In: the runs of all units, and the range of their tokens that makes the shard. Out: an Arrow file, the bytes that
pyarrow writes for one batch of blocks; it has its name only when it is whole. So few runs are on the disk together with
their copies, and a preparation takes little more room than its result.

It goes on wherever it was stopped: a run is deleted only after its tokens are on the disk, so up to the end of the last
run that is gone the unfinished file is good, and the rest is written again.
"""

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.arrays import from_numpy
from data_prep.errors import UserError

SYNC_BYTES = 2**23  # of tokens between two waits for the disk; more of them are not in memory either
_HEAD_BYTES = 2**16  # an Arrow file's beginning is far shorter
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def fill_shard(
    path: Path,
    runs: Sequence[Path],
    starts: np.ndarray,
    first: int,
    num_blocks: int,
    block_size: int,
    dtype: np.dtype,
    is_freeing: bool,
) -> None:
    """Write a shard of tokens [first, first + num_blocks * block_size) of the stream that all runs make.

    Args:
        runs: Those that have some of these tokens, in order.
        starts: Where each run begins in the stream, and the end of the last one.
        is_freeing: Delete the runs that lie in this shard alone; only for one process with the folder.
    Raises:
        UserError: runs are gone and what was written of them too.
    """
    head, tail = frame(num_blocks, block_size, dtype)
    end = first + num_blocks * block_size
    temporary = path.with_suffix(".tmp")
    # tokens of the stream up to which the unfinished file is good
    done = max([first, *(int(starts[i + 1]) for i, run in enumerate(runs) if not run.exists())])
    good_bytes = len(head) + (done - first) * dtype.itemsize
    if done > first and (not temporary.exists() or temporary.stat().st_size < good_bytes):
        raise UserError(
            f"{temporary}: is gone, and the tokens that it held are nowhere else. Begin this dataset anew: "
            f"rm -rf {runs[0].parents[1]}"
        )
    with open(temporary, "r+b" if done > first else "wb", buffering=0) as out:
        out.truncate(good_bytes if done > first else 0)
        out.seek(0, os.SEEK_END)
        if done == first:
            _write(out, head)
        num_waiting = 0  # bytes since the last wait for the disk
        free: list[Path] = []
        for index, run in enumerate(runs):
            begin, stop = max(done, int(starts[index])), min(end, int(starts[index + 1]))
            for tokens in _read(run, begin - int(starts[index]), max(stop - begin, 0), dtype):
                _write(out, tokens.data)
                num_waiting += tokens.nbytes
                if num_waiting >= SYNC_BYTES:
                    num_waiting = _sync_and_delete(out, free)
            if is_freeing and starts[index] >= first and starts[index + 1] <= end:
                free.append(run)
        _write(out, tail)
        _sync_and_delete(out, free)
    put_in_place(temporary, path)


def frame(num_blocks: int, block_size: int, dtype: np.dtype) -> tuple[bytes, bytes]:
    """What stands before and after the tokens in the Arrow stream of one batch of so many blocks."""
    num_tokens = num_blocks * block_size
    schema = pa.schema({"input_ids": pa.list_(pa.from_numpy_dtype(dtype), block_size)})
    nothing = np.zeros(num_tokens, dtype)  # whose memory is never touched
    blocks = pa.FixedSizeListArray.from_arrays(from_numpy(nothing), type=schema.field("input_ids").type)
    sink = _Beginning()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([blocks], schema=schema))
    tail = b"\0" * (-num_tokens * dtype.itemsize % 8) + _END_OF_STREAM
    return bytes(sink.data[: sink.size - num_tokens * dtype.itemsize - len(tail)]), tail


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a written file its name, when it is on the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


class _Beginning(io.RawIOBase):
    """A file that keeps its beginning and its size."""

    def __init__(self) -> None:
        self.data, self.size = bytearray(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data)
        self.data += view[: max(_HEAD_BYTES - len(self.data), 0)]
        self.size += view.nbytes
        return view.nbytes


def _read(run: Path, first: int, num: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Tokens [first, first + num) of a run, SYNC_BYTES at a time."""
    if not num:
        return
    with open(run, "rb", buffering=0) as file:
        file.seek(first * dtype.itemsize)
        while num:
            tokens = np.fromfile(file, dtype, min(num, SYNC_BYTES // dtype.itemsize))
            if not len(tokens):
                raise OSError(f"{run}: ends {num:,} tokens early")
            yield tokens
            num -= len(tokens)


def _write(out: io.FileIO, data: object) -> None:
    view = memoryview(data).cast("B")
    while len(view):
        view = view[out.write(view) :]


def _sync_and_delete(out: io.FileIO, free: list[Path]) -> int:
    os.fsync(out.fileno())
    for run in free:
        run.unlink(missing_ok=True)
    free.clear()
    return 0
