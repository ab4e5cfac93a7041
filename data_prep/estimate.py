"""`prep --estimate`: documents, tokens, disk and time of a preparation, before anything is written.

In: a plan. Out: text. Some units of each source, drawn over its files, are encoded in a temporary folder as they would
be in earnest; what they give is scaled by the bytes of input. Of files elsewhere only ends and row groups are read.
"""

import hashlib
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_prep.align import NUM_WRITERS
from data_prep.downloads import FILES_AHEAD, FILES_AT_ONCE, Downloads
from data_prep.encode import encode_unit, rows_path
from data_prep.encoder import EncoderChoice, load_tokenizer_json, reference_name
from data_prep.errors import UserError
from data_prep.fast_encoder import FastEncoder, fast_name, structure_problem
from data_prep.filling import SYNC_BYTES
from data_prep.jobs import make_job, make_stream
from data_prep.listing import list_far_files
from data_prep.manifest import token_dtype
from data_prep.packing import CONCAT
from data_prep.plan import BYTES_PER_TOKEN, Plan
from data_prep.readers import Piece, read_records
from data_prep.sizes import format_bytes, format_count, format_table
from data_prep.sources import SourceFile
from data_prep.spread import sample_units
from data_prep.stream import Stream
from data_prep.tokenizer_folder import describe_tokenizer, import_tokenizer
from data_prep.units import Unit
from data_prep.urls import read_range

SAMPLE_BYTES = 2_000_000  # of each sample, before compression
MOST_SAMPLES = 8  # of each source
START_S = 2.0  # of the command and its workers
MAP_BYTES = 24  # a document in the document map
# of one process where nothing can be measured yet: benchmarks/results/data_prep.md, 500 MB of JSON lines, half of two
RATE_WITHOUT_TOKENIZER = 43_000_000


@dataclass
class SourceEstimate:
    """One source: what was sampled, and its whole. `parts` holds (input bytes, documents, text bytes, tokens) each."""

    input_bytes: int
    parts: list[tuple[int, int, int, int]] = field(default_factory=list)
    map_bytes: int = 0  # of the sampled documents' map, about
    seconds: float = 0.0  # of encoding them
    fetched_bytes: int = 0
    fetch_s: float = 0.0

    def total(self, column: int) -> float:
        """A column of `parts`, scaled to the whole source."""
        sampled = sum(part[0] for part in self.parts)
        return sum(part[column] for part in self.parts) * self.input_bytes / sampled if sampled else 0.0

    @property
    def error(self) -> float | None:
        """Two standard errors of tokens by byte of input, as a share; 0 if all was read, None of one sample."""
        if sum(part[0] for part in self.parts) >= self.input_bytes:
            return 0.0
        if len(self.parts) < 2:
            return None
        ratios = [part[3] / max(part[0], 1) for part in self.parts]
        mean = sum(ratios) / len(ratios)
        variance = sum((ratio - mean) ** 2 for ratio in ratios) / (len(ratios) - 1)
        return 2 * math.sqrt(variance / len(ratios)) / mean if mean else None


def describe_estimate(plan: Plan, num_proc: int) -> str:
    """What preparing the plan would give and take.

    Raises:
        UserError: as `prepare`, as far as it can be seen without reading everything.
    """
    with tempfile.TemporaryDirectory() as name:
        trial = replace(plan, folder=Path(name) / "trial", keep_downloads=False)
        trial.work.mkdir(parents=True)
        files = [
            (number, file)
            for number, source in enumerate(plan.sources)
            for file in (
                plan.local_files[number] if source.entry.path is not None else list_far_files(source.entry, False)
            )
        ]
        stream = make_stream(trial, files)
        estimates, encoder, dtype = _measure(trial, stream)
        stream.downloads.close()
    return "\n".join(_lines(plan, estimates, files, stream, encoder, dtype, num_proc))


def _measure(plan: Plan, stream: Stream) -> tuple[list[SourceEstimate], str, str]:
    is_trained = "train" in plan.tokenizer
    if is_trained:
        encoder, tokenizer = None, None
        dtype = str(token_dtype(plan.tokenizer["train"]))
    else:
        import_tokenizer(plan.tokenizer.get("path") or plan.tokenizer["id"], plan.tokenizer_folder)
        tokenizer = describe_tokenizer(plan.tokenizer_folder, plan.tokenizer)
        dtype = str(token_dtype(tokenizer.vocab_size))
        raw = load_tokenizer_json(plan.tokenizer_folder, tokenizer)
        is_fast = fast_name() is not None and structure_problem(raw) is None and _can_load(raw)
        encoder = EncoderChoice(fast_name() if is_fast else reference_name(), is_fast)
    estimates = []
    for number in range(len(plan.sources)):
        size = sum(file.size for n, file in stream.files if n == number and file.split == "train")
        estimate = SourceEstimate(size)
        for unit in _samples(plan, stream, number, estimate):
            if tokenizer is None:
                estimate.parts.append(_count(stream, unit))
                continue
            job = replace(make_job(plan, stream, unit, tokenizer, encoder, 0), is_bad_skipped=True, filters=None)
            if not estimates and not estimate.parts:
                encode_unit(job, lambda *counts: None)  # what is loaded once is not to be measured
            started_s = time.perf_counter()
            result = encode_unit(job, lambda *counts: None)
            estimate.seconds += time.perf_counter() - started_s
            splits = [split for counts in result.counts for split in counts.splits.values()]
            sums = [
                sum(getattr(split, key) for split in splits) for key in ("num_documents", "num_bytes", "num_tokens")
            ]
            estimate.parts.append((unit.num_bytes, *sums))
            estimate.map_bytes += rows_path(job.work, job.key).stat().st_size
        estimates.append(estimate)
    name = "none: it is not trained yet" if encoder is None else encoder.name
    return estimates, name, dtype


def _can_load(raw: dict) -> bool:
    try:
        FastEncoder(raw)
    except Exception:  # whatever a foreign library raises
        return False
    return True


def _samples(plan: Plan, stream: Stream, number: int, estimate: SourceEstimate) -> Iterator[Unit]:
    """Some units of a source, drawn, each fetched; records in a row are not joined over their borders."""
    source, downloads = stream.sources[number], stream.downloads
    source = replace(source, entry=replace(source.entry, document_start=None))
    files = [(i, file) for i, (n, file) in enumerate(stream.files) if n == number and file.split == "train"]
    heads = [(i, file) for i, file in files if _is_read_by_head(file, downloads, i)]
    others = [item for item in files if item not in heads]
    units = sample_units(source, number, others, downloads, 0 if heads else SAMPLE_BYTES, _draw)
    candidates: list[Unit | tuple[int, SourceFile]] = [*(small for unit in units for small in _smaller(unit)), *heads]
    candidates.sort(key=lambda each: _draw(repr(each)))
    for each in candidates[:MOST_SAMPLES]:
        started_s = time.perf_counter()
        unit = each if isinstance(each, Unit) else _head_unit(number, *each, downloads)
        is_far = downloads.is_remote(unit.pieces[0].file)
        downloads.fetch_unit(unit.pieces if isinstance(each, Unit) else ())
        if is_far:
            estimate.fetch_s += time.perf_counter() - started_s
            estimate.fetched_bytes += unit.num_bytes
        yield unit


def _smaller(unit: Unit) -> list[Unit]:
    """A part of a unit of lines; another unit as it is."""
    piece = unit.pieces[0]
    if len(unit.pieces) > 1 or piece.format not in ("jsonl", "text", "bin") or piece.end is None:
        return [unit]
    end = min(piece.start + SAMPLE_BYTES, piece.end)
    return [replace(unit, pieces=(replace(piece, end=end),), num_bytes=end - piece.start, continues_file=False)]


def _is_read_by_head(file: SourceFile, downloads: Downloads, index: int) -> bool:
    is_compressed = file.format in ("jsonl.gz", "jsonl.zst")
    return is_compressed or (file.format == "jsonl" and downloads.is_far(index))


def _head_unit(number: int, index: int, file: SourceFile, downloads: Downloads) -> Unit:
    """The first lines of a file, unpacked into a file of their own."""
    head_bytes = min(SAMPLE_BYTES // 2, file.size)
    if downloads.is_far(index):
        system, path = downloads.range_reader(index)
        data = read_range(system, path, 0, head_bytes, file.name, size=file.size)
    else:
        with open(downloads.path(index), "rb") as opened:
            data = opened.read(head_bytes)
    try:
        if file.format == "jsonl.gz":
            data = zlib.decompressobj(31).decompress(data)
        elif file.format == "jsonl.zst":
            import zstandard

            data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    except Exception as error:  # zlib.error, zstandard.ZstdError
        raise UserError(f"{file.name}: its beginning cannot be decompressed ({error}).") from error
    whole_lines = data if head_bytes == file.size else data[: data.rfind(b"\n") + 1]
    path = downloads.folder / f"head-{index}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(whole_lines)
    share = len(whole_lines) / max(len(data), 1)
    return Unit(number, "train", (Piece(index, str(path), "jsonl"),), max(int(head_bytes * share), 1))


def _count(stream: Stream, unit: Unit) -> tuple[int, int, int, int]:
    """A sample where there is no tokenizer yet: its tokens are a guess."""
    num_documents = num_bytes = 0
    for record in read_records(unit.pieces, stream.reading(unit.source)):
        if record.text:
            num_documents += 1
            num_bytes += len(record.text.encode())
    return unit.num_bytes, num_documents, num_bytes, num_bytes // BYTES_PER_TOKEN + num_documents


def _draw(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _lines(
    plan: Plan,
    estimates: list[SourceEstimate],
    files: list[tuple[int, SourceFile]],
    stream: Stream,
    encoder: str,
    dtype: str,
    num_proc: int,
) -> Iterator[str]:
    rows = [("source", "files", "input", "documents", "text", "tokens", "bytes/token", "tokens +-")]
    shares, documents_left, tokens_left = [], plan.max_docs or math.inf, plan.max_tokens or math.inf
    for number, estimate in enumerate(estimates):
        num_documents, num_tokens = estimate.total(1), estimate.total(3)
        cap = min(plan.sources[number].max_documents or math.inf, documents_left)
        share = min(1.0, cap / num_documents if num_documents else 1.0, tokens_left / num_tokens if num_tokens else 1.0)
        documents_left, tokens_left = documents_left - num_documents * share, tokens_left - num_tokens * share
        shares.append(max(share, 0.0))
        num_bytes = estimate.total(2)
        error = estimate.error
        rows.append(
            (
                plan.sources[number].label,
                f"{sum(1 for n, _ in files if n == number):,}",
                format_bytes(int(estimate.input_bytes * shares[-1])),
                format_count(int(num_documents * shares[-1])),
                format_bytes(int(num_bytes * shares[-1])),
                format_count(int(num_tokens * shares[-1])),
                f"{num_bytes / num_tokens:.2f}" if num_tokens else "-",
                "one sample" if error is None else f"{error:.1%}" if error else "all read",
            )
        )
    yield from format_table(rows)
    totals = [sum(e.total(c) * share for e, share in zip(estimates, shares, strict=True)) for c in range(4)]
    yield from _describe_disk(plan, estimates, files, stream, dtype, totals, shares)
    yield from _describe_time(plan, estimates, stream, totals, num_proc)
    if plan.filters is not None:
        yield f"this is without what the filters leave out, and without their time: {', '.join(plan.filters.options)}"
    sampled = [sum(len(e.parts) for e in estimates), sum(part[2] for e in estimates for part in e.parts)]
    guess = "" if "train" not in plan.tokenizer else f" Tokens are a guess: {BYTES_PER_TOKEN} bytes each."
    yield (
        f"from {sampled[0]} samples with {format_bytes(sampled[1])} of text, drawn over the files; encoder: {encoder}."
        f"{guess} +- is two standard errors between the samples. Nothing was written."
    )


def _describe_disk(
    plan: Plan,
    estimates: list[SourceEstimate],
    files: list[tuple[int, SourceFile]],
    stream: Stream,
    dtype: str,
    totals: list[float],
    shares: list[float],
) -> Iterator[str]:
    blocks = totals[3] * int(dtype.removeprefix("uint")) // 8
    sampled = sum(part[1] for e in estimates for part in e.parts)
    by_document = max(sum(e.map_bytes for e in estimates) / sampled if sampled else 0, MAP_BYTES)
    document_map = totals[1] * by_document
    far = [(n, file.size) for index, (n, file) in enumerate(files) if stream.downloads.is_far(index)]
    needed = sum(size * shares[n] for n, size in far)
    at_once = needed
    if not plan.keep_downloads:
        is_packed = any(file.format.endswith((".gz", ".zst")) for _, file in files)
        num_files = FILES_AHEAD + (FILES_AT_ONCE if is_packed else 2)
        at_once = min(needed, num_files * max((size for _, size in far), default=0))
    end, in_two_places = blocks + document_map, blocks
    if plan.packing == CONCAT:  # a run is gone when it is in a shard
        in_a_unit = max(stream.unit_bytes, *(f.size for _, f in files if f.format.endswith((".gz", ".zst"))), 0)
        num_input_bytes = max(sum(file.size for _, file in files), 1)
        in_two_places = min(NUM_WRITERS * (blocks * in_a_unit / num_input_bytes + SYNC_BYTES), blocks)
    peak = end + in_two_places + document_map + at_once
    parent = plan.folder.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    downloads = f", {format_bytes(int(at_once))} of it downloads" if far else ""
    yield f"disk: {format_bytes(int(end))} at the end, {format_bytes(int(peak))} at the peak{downloads}; free: " + (
        f"{format_bytes(free)}" + (", which is NOT ENOUGH" if peak > free else "")
    )


def _describe_time(
    plan: Plan, estimates: list[SourceEstimate], stream: Stream, totals: list[float], num_proc: int
) -> Iterator[str]:
    seconds, sampled = sum(e.seconds for e in estimates), sum(part[2] for e in estimates for part in e.parts)
    rate = sampled / seconds if seconds else RATE_WITHOUT_TOKENIZER
    how = "measured on the samples" if seconds else "measured on another machine, without training the tokenizer"
    total_s = START_S + totals[2] / rate / num_proc
    yield f"time: about {_duration(total_s)} on {num_proc} processes, {rate / 1e6:.0f} MB/s of text each, {how}"
    fetched, fetch_s = sum(e.fetched_bytes for e in estimates), sum(e.fetch_s for e in estimates)
    if fetch_s:
        share = totals[0] / fetched * fetch_s
        yield (
            f"download: {format_bytes(int(totals[0]))}; one after the other as the samples, {_duration(share)}; "
            f"up to {FILES_AHEAD} files come at once"
        )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def default_num_proc() -> int:
    """All cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
