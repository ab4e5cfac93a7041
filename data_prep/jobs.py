"""A plan turned into work: its stream of units, and each unit with all that its result depends on.

In: a `Plan` and its files. Out: the `Stream`, and `Job`s whose keys are equal exactly when input and settings are.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from data_prep.downloads import FILES_AT_ONCE, Downloads
from data_prep.encode import Job, load_result
from data_prep.encoder import EncoderChoice
from data_prep.errors import UserError
from data_prep.manifest import TokenizerInfo, token_dtype
from data_prep.plan import Plan
from data_prep.sources import SourceFile
from data_prep.stream import Stream
from data_prep.units import Unit


def make_stream(plan: Plan, files: list[tuple[int, SourceFile]], folder: Path | None = None) -> Stream:
    """The plan's stream.

    Args:
        folder: For downloads, if not the plan's working folder.
    """
    return Stream(
        plan.sources,
        files,
        Downloads(plan.sources, files, folder or plan.work / "downloads", plan.keep_downloads),
        plan.keep_columns,
        plan.max_tokens,
        plan.max_docs,
        plan.buckets,
        plan.is_spread,
        plan.skip_failed,
        dict(plan.failed),
    )


def make_jobs(
    plan: Plan, stream: Stream, tokenizer: TokenizerInfo, encoder: EncoderChoice, threshold: int
) -> Iterator[Job | None]:
    """The stream's units with all that their results depend on, lazily; None as in `Stream.units`."""
    begun: set[int] = set()  # far files whose units may not all be done
    for unit in stream.units():
        if unit is None:
            yield None
            begun.clear()
            continue
        first = unit.pieces[0].file
        if stream.downloads.is_remote(first):
            if first not in begun and len(begun) == FILES_AT_ONCE:
                yield None  # then they are done, and removed
                begun.clear()
            begun.add(first)
        job = make_job(plan, stream, unit, tokenizer, encoder, threshold)
        try:
            _fetch(plan, stream, unit, job.key)
        except UserError as error:
            stream.fail(unit.source, error)
            continue
        yield job


def make_job(
    plan: Plan, stream: Stream, unit: Unit, tokenizer: TokenizerInfo, encoder: EncoderChoice, threshold: int
) -> Job:
    """A unit with all that its result depends on."""
    source = plan.sources[unit.source]
    reading = stream.reading(unit.source)
    is_skipped = source.entry.on_bad_record == "skip"
    unit_threshold = 0 if source.has_official_validation else threshold
    dtype = str(token_dtype(tokenizer.vocab_size))
    settings = {
        "tokenizer": tokenizer.sha256,
        "encoder": encoder.name,
        "compare_ids": encoder.compare_ids,
        "dtype": dtype,
        "threshold": unit_threshold,
        "is_bad_skipped": is_skipped,
        "reading": asdict(reading),
    }
    return Job(
        unit=unit,
        key=unit.key(settings, [stream.files[piece.file][1].identity for piece in unit.pieces]),
        work=plan.work,
        tokenizer_folder=plan.tokenizer_folder,
        tokenizer=replace(tokenizer, source=None),  # hashable: a worker keeps its encoder by it
        dtype=dtype,
        threshold=unit_threshold,
        reading=reading,
        is_bad_skipped=is_skipped,
        is_fast=encoder.is_fast,
        compare_ids=encoder.compare_ids,
    )


def _fetch(plan: Plan, stream: Stream, unit: Unit, key: str) -> None:
    """Have here what a unit is made of, unless an earlier attempt finished it."""
    is_far = any(stream.downloads.is_remote(piece.file) for piece in unit.pieces)
    if is_far and load_result(plan.work, key) is None:
        stream.downloads.fetch_unit(unit.pieces)
