"""Token runs into shards of blocks, and unit tables into the document map.

In: the runs of all units, in order, with their lengths. Out: <split>/data-00000.arrow ... and documents/<split>.arrow.
A shard holds SHARD_TOKENS // block_size blocks, the last one the rest; it copies exactly its range of the stream,
wherever runs begin and end, and a run is deleted as soon as nothing needs it (data_prep/filling.py). Worked example,
block_size 4, two blocks a shard, runs of 7, 5 and 6 tokens: shard 0 is run 0 and the first token of run 1, shard 1 the
other 4 tokens of run 1 and the first 4 of run 2; 2 tokens are left over.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.arrays import from_numpy, in_one, to_numpy
from data_prep.documents import ROWS_PER_BATCH, map_path, map_schema
from data_prep.encode import rows_path, run_name, run_path
from data_prep.filling import fill_shard, put_in_place
from data_prep.ledger import TRAIN, VALIDATION
from data_prep.manifest import ShardInfo, sha256_of
from data_prep.progress import Progress

SHARD_TOKENS = 2**26  # 134 MB of uint16: small enough to hold in memory, large enough to be few
NUM_WRITERS = 2  # shards in the making at a time


@dataclass(frozen=True)
class Taken:
    """What of a unit is kept: its first `num_rows` records, and the tokens of these by `run_name`."""

    key: str
    num_rows: int
    first_record: int  # what to add to the unit's record numbers
    num_tokens: dict[str, int]


def write_split(
    folder: Path,
    work: Path,
    bucket: str,
    split: str,
    units: list[Taken],
    block_size: int,
    dtype: np.dtype,
    progress: Progress,
    part: tuple[int, int] = (0, 1),
) -> tuple[ShardInfo, ...]:
    """All shards of a split (of a bucket, or ""), and what `datasets.load_from_disk` wants beside them.

    Shards that an earlier attempt wrote stay.

    Args:
        part: (i, n) writes only the i-th of each n shards, with a note of its checksum, and leaves the rest to others.
    """
    run = run_name(bucket, split)
    starts = np.cumsum([0, *(unit.num_tokens[run] for unit in units)], dtype=np.int64)
    num_blocks = int(starts[-1]) // block_size
    rows_per_shard = max(SHARD_TOKENS // block_size, 1)
    (folder / split).mkdir(exist_ok=True)
    before = {path.name for path in (folder / split).glob("*.arrow")}

    def write(number: int) -> ShardInfo:
        first = number * rows_per_shard
        rows = min(rows_per_shard, num_blocks - first)
        path = folder / split / f"data-{number:05d}.arrow"
        note = note_path(number)
        if path.exists() and note.exists():
            return ShardInfo(**json.loads(note.read_text(encoding="utf-8")))
        if not path.exists():
            begin = int(np.searchsorted(starts, first * block_size, side="right")) - 1
            end = int(np.searchsorted(starts, (first + rows) * block_size))
            runs = [run_path(work, unit.key, run) for unit in units[begin:end]]  # few of all: there are many shards
            # machines that share the folder cannot know of each other when a run is free before its shard is there
            fill_shard(path, runs, starts[begin : end + 1], first * block_size, rows, block_size, dtype, part == (0, 1))
        info = ShardInfo(f"{split}/{path.name}", rows, path.stat().st_size, sha256_of(path))
        if part != (0, 1):
            temporary = note.with_suffix(".tmp")
            temporary.write_text(json.dumps(asdict(info)), encoding="utf-8")
            os.replace(temporary, note)
            free_runs(first * block_size, (first + rows) * block_size)
        return info

    def note_path(number: int) -> Path:
        return work / f"{run}-{number:05d}.shard.json"

    def free_runs(first: int, end: int) -> None:
        """Remove runs with tokens in [first, end) whose shards are all noted, whoever wrote them."""
        index = int(np.searchsorted(starts, first, side="right")) - 1
        while index < len(units) and starts[index] < end:
            last = min(max(int(starts[index + 1]) - 1, 0) // (rows_per_shard * block_size), numbers[-1])
            touched = range(int(starts[index]) // (rows_per_shard * block_size), last + 1)
            if all(note_path(number).exists() for number in touched):
                run_path(work, units[index].key, run).unlink(missing_ok=True)
            index += 1

    numbers = range(max(-(-num_blocks // rows_per_shard), 1))
    if part != (0, 1):
        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            return tuple(pool.map(write, numbers[part[0] :: part[1]]))
    shards: list[ShardInfo] = []
    num_used = 0  # runs that no later shard needs
    with ThreadPoolExecutor(NUM_WRITERS) as pool:  # reading, writing and hashing leave Python to others
        for shard in pool.map(write, numbers):
            shards.append(shard)
            progress.add_input(shard.num_bytes, Path(shard.file).name in before)
            done = (len(shards) - 1) * rows_per_shard * block_size + shard.num_blocks * block_size
            while num_used < len(units) and starts[num_used + 1] <= done:
                run_path(work, units[num_used].key, run).unlink(missing_ok=True)
                num_used += 1
    write_dataset_files(folder / split, split, shards, block_size, dtype)
    return tuple(shards)


def write_document_map(
    folder: Path, work: Path, bucket: int, split: str, units: Iterable[Taken], keep_columns: dict[str, str]
) -> str:
    """documents/<split>.arrow of a bucket (0 where there are none), a fixed number of rows per batch; its sha256."""
    path = map_path(folder, split)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    schema = map_schema(keep_columns)
    waiting: list[pa.RecordBatch] = []
    with open(temporary, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        first_token = 0
        for unit in units:
            rows = read_rows(work, unit.key).slice(0, unit.num_rows)
            is_in_split = to_numpy(rows["status"]) == (TRAIN if split == "train" else VALIDATION)
            is_here = is_in_split & (to_numpy(rows["bucket"]) == bucket)
            file, record, num_tokens, num_bytes = (
                to_numpy(rows[name])[is_here] for name in ("file", "record", "num_tokens", "num_bytes")
            )
            num_tokens = num_tokens.astype(np.uint64)
            ends = first_token + np.cumsum(num_tokens, dtype=np.uint64)
            columns = {
                "first_token": from_numpy(ends - num_tokens),
                "source": from_numpy(file),
                "record": from_numpy(record + np.uint64(unit.first_record)),
                "num_bytes": from_numpy(num_bytes),
            }
            for name, kind in keep_columns.items():
                is_there = name in rows.column_names
                column = rows[name].filter(from_numpy(is_here)) if is_there else None
                columns[name] = in_one(column) if is_there else pa.nulls(len(ends), pa.type_for_alias(kind))
            waiting += pa.table(columns, schema=schema).to_batches()
            first_token = int(ends[-1]) if len(ends) else first_token
            if sum(len(batch) for batch in waiting) >= ROWS_PER_BATCH:
                waiting = _write_full_batches(writer, waiting, schema)
        for batch in pa.Table.from_batches(waiting, schema).combine_chunks().to_batches():
            writer.write_batch(batch)  # one batch, or none
    put_in_place(temporary, path)
    return sha256_of(path)


def read_rows(work: Path, key: str) -> pa.Table:
    """The table of a unit's records."""
    with pa.OSFile(str(rows_path(work, key))) as file:
        return pa.ipc.open_stream(file).read_all()


def _write_full_batches(
    writer: pa.RecordBatchStreamWriter, batches: list[pa.RecordBatch], schema: pa.Schema
) -> list[pa.RecordBatch]:
    """Write batches of exactly ROWS_PER_BATCH rows; what is left over comes back."""
    table = pa.Table.from_batches(batches, schema).combine_chunks()
    num_full = len(table) // ROWS_PER_BATCH * ROWS_PER_BATCH
    for start in range(0, num_full, ROWS_PER_BATCH):
        writer.write_batch(table.slice(start, ROWS_PER_BATCH).combine_chunks().to_batches()[0])
    return table.slice(num_full).to_batches()


def read_range(
    work: Path, run: str, units: list[Taken], starts: np.ndarray, first: int, end: int, dtype: np.dtype
) -> np.ndarray:
    """Tokens [first, end) of the stream that the runs of this name make."""
    out = np.empty(end - first, dtype=dtype)
    index = int(np.searchsorted(starts, first, side="right")) - 1
    position = first
    while position < end:
        stop = min(int(starts[index + 1]), end)
        if stop > position:
            with open(run_path(work, units[index].key, run), "rb", buffering=0) as file:
                file.seek((position - int(starts[index])) * dtype.itemsize)
                wanted = out[position - first : stop - first].view(np.uint8)
                if file.readinto(wanted) != len(wanted):
                    raise OSError(f"{file.name}: ends before its {units[index].num_tokens[run]:,} tokens")
            position = stop
        index += 1
    return out


def write_shard(path: Path, tokens: np.ndarray, block_size: int) -> None:
    """One Arrow file with the blocks of these tokens, whole or not at all."""
    schema = pa.schema({"input_ids": pa.list_(pa.from_numpy_dtype(tokens.dtype), block_size)})
    blocks = pa.FixedSizeListArray.from_arrays(from_numpy(tokens), type=schema.field("input_ids").type)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pa.record_batch([blocks], schema=schema))
    put_in_place(temporary, path)


def write_dataset_files(folder: Path, split: str, shards: list[ShardInfo], block_size: int, dtype: np.dtype) -> None:
    """state.json and dataset_info.json, as `datasets.Dataset.save_to_disk` writes them."""
    feature = {"feature": {"dtype": str(dtype), "_type": "Value"}, "length": block_size, "_type": "List"}
    state = {
        "_data_files": [{"filename": Path(shard.file).name} for shard in shards],
        # `datasets` finds cached results of map() by this: it must differ wherever the content does.
        "_fingerprint": hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    (folder / "dataset_info.json").write_text(
        json.dumps({"features": {"input_ids": feature}}, indent=2) + "\n", encoding="utf-8"
    )
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
