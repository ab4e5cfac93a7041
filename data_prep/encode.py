"""One unit, encoded: what a worker does.

In: a `Job`. Out: in the working folder, for unit <key>: the token runs <key>.train.bin and <key>.validation.bin (raw
ids, separators included), the table <key>.rows.arrow (one row per record: what became of it, and its part of the
document map), and <key>.json with the counts, renamed into place last: it exists exactly when the others are whole.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.encoder import Encoder, add_separators
from data_prep.ledger import BAD, EMPTY, TRAIN, VALIDATION, Counts, SplitCounts, count_rows
from data_prep.manifest import SPLITS, TokenizerInfo
from data_prep.readers import Reading, Record, read_records
from data_prep.units import Unit

BATCH_BYTES = 1_000_000
BATCH_DOCUMENTS = 512
ROW_COLUMNS = [
    ("file", pa.uint32()),
    ("record", pa.uint64()),
    ("status", pa.uint8()),
    ("num_tokens", pa.uint32()),
    ("num_bytes", pa.uint32()),
    ("num_characters", pa.uint32()),
]


@dataclass(frozen=True)
class Job:
    """A unit and all that its result depends on."""

    unit: Unit
    key: str
    work: Path
    tokenizer_folder: Path
    tokenizer: TokenizerInfo
    dtype: str
    threshold: int  # a document whose hash lies below goes to validation
    reading: Reading
    is_bad_skipped: bool


@dataclass(frozen=True)
class UnitResult:
    """A finished unit.

    `problem` is its first bad record (file, record, what), where it stopped because bad records are errors.
    """

    key: str
    num_records: int  # the highest record number + 1, counted from the unit's start
    counts: Counts
    problem: tuple[int, int, str] | None
    run_bytes: dict[str, int]


def run_path(work: Path, key: str, split: str) -> Path:
    """The raw token run that a unit gives to a split."""
    return work / f"{key}.{split}.bin"


def rows_path(work: Path, key: str) -> Path:
    """The table of a unit's records."""
    return work / f"{key}.rows.arrow"


def text_hash(data: bytes) -> int:
    """64 bits of blake2b: decides the split of a document by its text alone, so that equal texts never lie in both."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def load_result(work: Path, key: str) -> UnitResult | None:
    """A unit's result if an earlier attempt finished it."""
    try:
        raw = json.loads((work / f"{key}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    sizes = {name: run_path(work, key, name) for name in SPLITS}
    if any(not path.exists() or path.stat().st_size != raw["run_bytes"][name] for name, path in sizes.items()):
        return None
    counts = raw["counts"]
    splits = {name: SplitCounts(**counts["splits"][name]) for name in SPLITS}
    problem = tuple(raw["problem"]) if raw["problem"] else None
    return UnitResult(raw["key"], raw["num_records"], Counts(**{**counts, "splits": splits}), problem, raw["run_bytes"])


def encode_unit(job: Job, report: Callable[[int, int], None]) -> UnitResult:
    """Encode one unit and leave its files in the working folder.

    Args:
        report: Called after each batch with the bytes of text and the tokens since the last call.
    """
    schema = pa.schema([*ROW_COLUMNS, *((name, pa.type_for_alias(kind)) for name, kind in job.reading.keep_columns)])
    encoder = _load_encoder(job.tokenizer_folder, job.tokenizer)
    counts, num_records, problem = Counts(), 0, None
    temporary = {name: run_path(job.work, f"{job.key}.{os.getpid()}", name) for name in SPLITS}
    rows_temporary = rows_path(job.work, f"{job.key}.{os.getpid()}")
    with (
        open(temporary["train"], "wb") as train,
        open(temporary["validation"], "wb") as validation,
        open(rows_temporary, "wb") as rows_file,
    ):
        with pa.ipc.new_stream(rows_file, schema) as rows_writer:
            for records in _batches(read_records(job.unit.pieces, job.reading)):
                num_records = records[-1].number + 1
                records = [record for record in records if record.text is not None or record.problem is not None]
                bad = next((i for i, record in enumerate(records) if record.problem is not None), None)
                if bad is not None and not job.is_bad_skipped:
                    problem = (records[bad].file, records[bad].number, records[bad].problem)
                    records = records[:bad]
                rows, runs = _encode_batch(records, job, encoder)
                for file, run in zip((train, validation), runs, strict=True):
                    file.write(run.astype(job.dtype).data)  # tofile() would hide why a write fails
                kept = (
                    zip(*(record.kept for record in records), strict=True)
                    if job.reading.keep_columns and records
                    else ()
                )
                kept_arrays = [
                    pa.array(values, schema.field(len(ROW_COLUMNS) + i).type) for i, values in enumerate(kept)
                ]
                if records:
                    rows_writer.write_batch(
                        pa.record_batch([*map(pa.array, rows.values()), *kept_arrays], schema=schema)
                    )
                    counts.add(count_rows(rows, job.tokenizer.is_bos_written))
                report(int(rows["num_bytes"].sum(dtype=np.int64)), sum(len(run) for run in runs))
                if problem is not None:
                    break
        for file in (train, validation, rows_file):
            file.flush()
            os.fsync(file.fileno())
    run_bytes = {name: path.stat().st_size for name, path in temporary.items()}
    for name, path in temporary.items():
        # What was written, against what was made: the size of the file is the count of record.
        counts.splits[name].num_tokens = run_bytes[name] // np.dtype(job.dtype).itemsize
        os.replace(path, run_path(job.work, job.key, name))
    os.replace(rows_temporary, rows_path(job.work, job.key))
    result = UnitResult(job.key, num_records, counts, problem, run_bytes)
    marker = job.work / f"{job.key}.{os.getpid()}.json.tmp"
    marker.write_text(json.dumps(asdict(result)), encoding="utf-8")
    os.replace(marker, job.work / f"{job.key}.json")
    return result


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    num_characters = 0
    for record in records:
        batch.append(record)
        num_characters += len(record.text or "")
        if num_characters >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _encode_batch(
    records: list[Record], job: Job, encoder: Encoder
) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The table of the records, and the tokens for train and validation."""
    num = len(records)
    data = [(record.text or "").encode() for record in records]
    is_kept = np.array([record.problem is None and record.text != "" for record in records], dtype=bool)
    status = np.full(num, BAD, dtype=np.uint8)
    status[[i for i, record in enumerate(records) if record.text == ""]] = EMPTY
    if job.unit.split == "validation":
        status[is_kept] = VALIDATION
    else:
        is_held_out = np.array([is_kept[i] and text_hash(data[i]) < job.threshold for i in range(num)], dtype=bool)
        status[is_kept] = np.where(is_held_out[is_kept], VALIDATION, TRAIN)
    num_tokens = np.zeros(num, dtype=np.uint32)
    runs = (np.empty(0, dtype=np.uint32),) * 2
    if is_kept.any():
        ids, lengths = encoder.encode([records[i].text for i in np.flatnonzero(is_kept)])
        ids, lengths = add_separators(ids, lengths, job.tokenizer)
        num_tokens[is_kept] = lengths
        is_validation = np.repeat(status[is_kept] == VALIDATION, lengths)
        runs = (ids[~is_validation], ids[is_validation])
    rows = {
        "file": np.array([record.file for record in records], dtype=np.uint32),
        "record": np.array([record.number for record in records], dtype=np.uint64),
        "status": status,
        "num_tokens": num_tokens,
        "num_bytes": np.array([len(each) for each in data], dtype=np.uint32),
        "num_characters": np.array([len(record.text or "") for record in records], dtype=np.uint32),
    }
    return rows, runs


@lru_cache(maxsize=1)
def _load_encoder(folder: Path, info: TokenizerInfo) -> Encoder:
    return Encoder(folder, info)
