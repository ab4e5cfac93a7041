"""One unit, encoded: what a worker does.

In: a `Job`. Out: in the working folder, for unit <key>: the token runs <key>.train.bin and <key>.validation.bin (raw
ids, separators included; with buckets <key>.<bucket>.train.bin ... for each), the table <key>.rows.arrow (one row per
record: what became of it, and its part of the document map), and <key>.json with the counts, renamed into place last:
it exists exactly when the others are whole. With filters also <key>.samples.bin, what was removed as samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import xxhash

from data_prep.arrays import from_list, from_numpy
from data_prep.buckets import bucket_names, column_names, find_bucket, is_there
from data_prep.encoder import Encoder, Ranges, add_separators
from data_prep.fast_encoder import SAMPLED_IN, EncoderMismatchError
from data_prep.ledger import (
    BAD,
    EMPTY,
    NO_BUCKET,
    NO_VALUE,
    TRAIN,
    VALIDATION,
    Counts,
    SplitCounts,
    count_rows,
)
from data_prep.manifest import SPLITS, TokenizerInfo
from data_prep.readers import Reading, Record, read_records
from data_prep.tokenized import join_ids, read_tokenized
from data_prep.units import Unit

if TYPE_CHECKING:  # where no filter is on, nothing of them is imported
    from data_prep.filter_settings import Filters
    from data_prep.screening import Decision
    from data_prep.sieve import Sieve

BATCH_BYTES = 1_000_000
BATCH_DOCUMENTS = 512
ROW_COLUMNS = [
    ("file", pa.uint32()),
    ("record", pa.uint64()),
    ("status", pa.uint8()),
    ("bucket", pa.uint16()),  # of a kept document; 0 without buckets
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
    is_fast: bool  # the fast encoder, else the reference
    compare_ids: int  # of the fast one's: so many from the unit's beginning are compared, and a document in SAMPLED_IN
    disputed: Ranges = ()  # characters whose documents are the reference's
    filters: Filters | None = None
    decision: Decision | None = None  # about this unit, where filters look at more than one document
    screen_key: str | None = None  # the key of its screening, which makes that decision
    is_screening: bool = False  # this is that screening


@dataclass(frozen=True)
class UnitResult:
    """A finished unit.

    `counts` has one entry for each bucket, or the one. `problem` is its first bad record (file, record, what), where it
    stopped because bad records are errors.
    """

    key: str
    num_records: int  # the highest record number + 1, counted from the unit's start
    counts: list[Counts]
    problem: tuple[int, int, str] | None
    run_bytes: dict[str, int]
    num_compared: int  # ids of the fast encoder that the reference confirmed


def run_name(bucket: str, split: str) -> str:
    """The name of what a unit gives to a split of a bucket; the bucket is "" where there are none."""
    return f"{bucket}.{split}" if bucket else split


def run_path(work: Path, key: str, name: str) -> Path:
    """The raw token run of a unit by its `run_name`."""
    return work / f"{key}.{name}.bin"


def rows_path(work: Path, key: str) -> Path:
    """The table of a unit's records."""
    return work / f"{key}.rows.arrow"


def text_hash(data: bytes) -> int:
    """64 bits of XXH3: decides the split of a document by its text alone, so that equal texts never lie in both."""
    return xxhash.xxh3_64_intdigest(data)


def load_result(job: Job) -> UnitResult | None:
    """A unit's result if an earlier attempt finished it, and treated bad records in the same way if it has any."""
    try:
        raw = json.loads((job.work / f"{job.key}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if raw["problem"] if job.is_bad_skipped else any(counts["num_bad"] for counts in raw["counts"]):
        return None
    paths = {run_path(job.work, job.key, name): num_bytes for name, num_bytes in raw["run_bytes"].items()}
    if any(not path.exists() or path.stat().st_size != num_bytes for path, num_bytes in paths.items()):
        return None
    counts = [
        Counts(**{**each, "splits": {name: SplitCounts(**split) for name, split in each["splits"].items()}})
        for each in raw["counts"]
    ]
    problem = tuple(raw["problem"]) if raw["problem"] else None
    return UnitResult(raw["key"], raw["num_records"], counts, problem, raw["run_bytes"], raw["num_compared"])


def encode_unit(job: Job, report: Callable[[int, int], None]) -> UnitResult:
    """Encode one unit and leave its files in the working folder.

    Args:
        report: Called after each batch with the bytes of text and the tokens since the last call.
    """
    sieve, more_columns = None, []
    if job.filters is not None:
        from data_prep import screening
        from data_prep import sieve as sieving

        if job.is_screening:
            return screening.screen_unit(job)
        sieve, more_columns = sieving.Sieve(job), sieving.filter_columns(job.filters)
    kept_columns = [(name, pa.type_for_alias(kind)) for name, kind in job.reading.keep_columns]
    own_columns = [*ROW_COLUMNS, *more_columns]
    schema = pa.schema([*own_columns, *kept_columns])
    encoder = _load_encoder(job.tokenizer_folder, job.tokenizer, job.is_fast, job.disputed)
    buckets = job.reading.buckets
    counts = [Counts() for _ in bucket_names(buckets)]
    num_records, num_compared, problem = 0, 0, None
    buckets_of_rows: list[np.ndarray] = []
    names = [run_name(bucket, split) for bucket in bucket_names(buckets) for split in SPLITS]
    temporary = {name: run_path(job.work, f"{job.key}.{os.getpid()}", name) for name in names}
    rows_temporary = rows_path(job.work, f"{job.key}.{os.getpid()}")
    with ExitStack() as stack:
        run_files = [stack.enter_context(open(path, "wb")) for path in temporary.values()]
        rows_file = stack.enter_context(open(rows_temporary, "wb"))
        with pa.ipc.new_stream(rows_file, schema) as rows_writer:
            for batch in iter_batches(job):
                num_records, records, problem = batch
                rows, runs, confirmed = _encode_batch(records, job, encoder, job.compare_ids - num_compared, sieve)
                num_compared += confirmed
                for file, run in zip(run_files, runs, strict=True):
                    file.write(run.astype(job.dtype).data)  # tofile() would hide why a write fails
                kept = (
                    zip(*(record.kept for record in records), strict=True)
                    if job.reading.keep_columns and records
                    else ()
                )
                kept_arrays = [from_list(values, kind) for values, (_, kind) in zip(kept, kept_columns, strict=False)]
                if records:
                    rows_writer.write_batch(
                        pa.record_batch([*map(from_numpy, rows.values()), *kept_arrays], schema=schema)
                    )
                    new_counts = count_rows(rows, job.tokenizer.is_bos_written, buckets, job.filters)
                    for total, new in zip(counts, new_counts, strict=True):
                        total.add(new)
                    buckets_of_rows.append(rows["bucket"])
                report(int(rows["num_bytes"].sum(dtype=np.int64)), sum(len(run) for run in runs))
        for file in (*run_files, rows_file):
            file.flush()
            os.fsync(file.fileno())
    run_bytes = {name: path.stat().st_size for name, path in temporary.items()}
    for index, (name, path) in enumerate(temporary.items()):
        # What was written, against what was made: the size of the file is the count of record.
        split = counts[index // len(SPLITS)].splits[SPLITS[index % len(SPLITS)]]
        split.num_tokens = run_bytes[name] // np.dtype(job.dtype).itemsize
        os.replace(path, run_path(job.work, job.key, name))
    os.replace(rows_temporary, rows_path(job.work, job.key))
    if sieve is not None:
        samples = run_path(job.work, f"{job.key}.{os.getpid()}", sieving.SAMPLES)
        samples.write_text(sieve.dump(np.concatenate([np.empty(0, dtype=np.uint16), *buckets_of_rows])))
        run_bytes[sieving.SAMPLES] = samples.stat().st_size
        os.replace(samples, run_path(job.work, job.key, sieving.SAMPLES))
    result = UnitResult(job.key, num_records, counts, problem, run_bytes, num_compared)
    marker = job.work / f"{job.key}.{os.getpid()}.json.tmp"
    marker.write_text(json.dumps(asdict(result)), encoding="utf-8")
    os.replace(marker, job.work / f"{job.key}.json")
    return result


def iter_batches(job: Job) -> Iterator[tuple[int, list[Record], tuple[int, int, str] | None]]:
    """The records of a unit in batches, each with the highest number so far + 1.

    The third is the first bad record where bad records are errors: it ends the unit, and its batch ends in front of it.
    """
    for records in _batches(_read(job)):
        num_records = records[-1].number + 1
        records = [record for record in records if record.text is not None or record.problem is not None]
        bad = next((i for i, record in enumerate(records) if record.problem is not None), None)
        if bad is not None and not job.is_bad_skipped:
            yield num_records, records[:bad], (records[bad].file, records[bad].number, records[bad].problem)
            return
        yield num_records, records, None


def _read(job: Job) -> Iterator[Record]:
    if job.reading.tokenized is None:
        return read_records(job.unit.pieces, job.reading)
    return read_tokenized(job.unit.pieces, job.reading, job.tokenizer, job.tokenizer_folder)


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
    records: list[Record], job: Job, encoder: Encoder, compare_ids: int, sieve: Sieve | None
) -> tuple[dict[str, np.ndarray], list[np.ndarray], int]:
    """The table of the records, the tokens for train and validation (of each bucket), and how many were compared."""
    num = len(records)
    is_kept = np.array([record.problem is None and record.text != "" for record in records], dtype=bool)
    status = np.full(num, BAD, dtype=np.uint8)
    status[[i for i, record in enumerate(records) if record.text == ""]] = EMPTY
    bucket = np.zeros(num, dtype=np.uint16)
    if job.reading.buckets:
        sort_into_buckets(records, job.reading, is_kept, status, bucket)
    more_columns = sieve.apply(records, is_kept, status) if sieve is not None else {}
    data = [(record.text or "").encode() for record in records]
    hashes = np.array([text_hash(data[i]) for i in np.flatnonzero(is_kept)], dtype=np.uint64)
    if job.unit.split == "validation":
        status[is_kept] = VALIDATION
    else:
        status[is_kept] = np.where(hashes < np.uint64(job.threshold), VALIDATION, TRAIN)
    num_tokens = np.zeros(num, dtype=np.uint32)
    num_compared = 0
    runs = [np.empty(0, dtype=np.uint32)] * (len(SPLITS) * len(bucket_names(job.reading.buckets)))
    if is_kept.any():
        kept = [records[i] for i in np.flatnonzero(is_kept)]
        is_tokenized = job.reading.tokenized is not None
        if is_tokenized:
            ids, lengths = join_ids(kept)
        else:
            ids, lengths = encoder.encode([record.text for record in kept], [data[i] for i in np.flatnonzero(is_kept)])
        if job.is_fast:
            is_first = np.cumsum(lengths) - lengths < compare_ids
            num_compared = _compare(kept, np.flatnonzero(is_first | (hashes % SAMPLED_IN == 0)), ids, lengths, encoder)
        ids, lengths = add_separators(ids, lengths, job.tokenizer)
        num_tokens[is_kept] = lengths
        run = bucket[is_kept].astype(np.int64) * len(SPLITS) + (status[is_kept] == VALIDATION)
        runs = _sort_into_runs(ids, lengths, run, len(runs))
    rows = {
        "file": np.array([record.file for record in records], dtype=np.uint32),
        "record": np.array([record.number for record in records], dtype=np.uint64),
        "status": status,
        "bucket": bucket,
        "num_tokens": num_tokens,
        "num_bytes": np.array([len(each) for each in data], dtype=np.uint32),
        "num_characters": np.array([len(record.text or "") for record in records], dtype=np.uint32),
        **more_columns,
    }
    return rows, runs, num_compared


def _sort_into_runs(ids: np.ndarray, lengths: np.ndarray, run: np.ndarray, num_runs: int) -> list[np.ndarray]:
    """The ids of each run, documents in order; `run` is the number of each document's."""
    if (run == run[0]).all():
        return [ids if number == run[0] else ids[:0] for number in range(num_runs)]
    borders = np.flatnonzero(np.diff(run)) + 1  # documents in a row of one run are copied at once
    ends = np.cumsum(lengths)
    pieces = np.split(ids, ends[borders - 1])
    of_piece = run[np.concatenate([[0], borders])]
    return [
        np.concatenate([ids[:0], *(piece for piece, n in zip(pieces, of_piece, strict=True) if n == number)])
        for number in range(num_runs)
    ]


def _compare(records: list[Record], some: np.ndarray, ids: np.ndarray, lengths: np.ndarray, encoder: Encoder) -> int:
    """Have the reference encode these of the records too; the number of ids that it confirmed.

    Raises:
        EncoderMismatchError: with the first that differs.
    """
    if not some.size:
        return 0
    exact, exact_lengths = encoder.reference.encode([records[i].text for i in some])
    ends, exact_ends = np.cumsum(lengths), np.cumsum(exact_lengths)
    for i, end, length in zip(some, exact_ends, exact_lengths, strict=True):
        ours, theirs = ids[ends[i] - lengths[i] : ends[i]], exact[end - length : end]
        if not np.array_equal(ours, theirs):
            record = {"file": records[i].file, "record": records[i].number, "text": records[i].text}
            raise EncoderMismatchError({**record, "ids": ours.tolist(), "reference_ids": theirs.tolist()})
    return int(exact_lengths.sum())


def sort_into_buckets(
    records: list[Record], reading: Reading, is_kept: np.ndarray, status: np.ndarray, bucket: np.ndarray
) -> None:
    """Note the bucket of each kept record; one that is in none is kept no longer, and its status says why."""
    columns = [name for name, _ in reading.keep_columns]
    looked_at = column_names(reading.buckets)
    for i in np.flatnonzero(is_kept):
        values = dict(zip(columns, records[i].kept, strict=True))
        number = find_bucket(reading.buckets, values)
        if number is None:
            is_kept[i] = False
            status[i] = NO_BUCKET if all(is_there(values[name]) for name in looked_at) else NO_VALUE
        else:
            bucket[i] = number


@lru_cache(maxsize=1)
def _load_encoder(folder: Path, info: TokenizerInfo, is_fast: bool, disputed: Ranges) -> Encoder:
    return Encoder(folder, info, is_fast, disputed)
