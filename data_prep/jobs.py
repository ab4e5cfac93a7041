"""A plan turned into work: its stream of units, and each unit with all that its result depends on.

In: a `Plan` and its files. Out: the `Stream`, and `Job`s whose keys are equal exactly when input and settings are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.downloads import FILES_AT_ONCE, Downloads
from data_prep.encode import Job, load_result
from data_prep.encoder import EncoderChoice
from data_prep.errors import UserError
from data_prep.filter_settings import library_versions
from data_prep.manifest import TokenizerInfo, token_dtype
from data_prep.plan import Plan
from data_prep.sources import SourceFile
from data_prep.stream import Stream
from data_prep.units import Unit

if TYPE_CHECKING:
    from data_prep.screening import Screening

UNITS_AT_ONCE = 32  # are screened before the first of them is encoded, while those in front are
UNITS_AT_ONCE_CAPPED = 4  # what lies beyond a cap is screened for nothing


def make_stream(plan: Plan, files: list[tuple[int, SourceFile]], folder: Path | None = None) -> Stream:
    """The plan's stream.

    Args:
        folder: For downloads, if not the plan's working folder.
    """
    is_capped = plan.max_docs or plan.max_tokens or any(source.max_documents for source in plan.sources)
    is_all_needed = not is_capped and not plan.is_spread and folder is None
    return Stream(
        plan.sources,
        files,
        Downloads(plan.sources, files, folder or plan.work / "downloads", plan.keep_downloads, is_all_needed),
        plan.keep_columns,
        plan.max_tokens,
        plan.max_docs,
        plan.buckets,
        plan.filters,
        plan.is_spread,
        plan.skip_failed,
        dict(plan.failed),
    )


def make_screening(plan: Plan) -> Screening | None:
    """Where a plan's filters look at more than one document, what decides about each unit."""
    if plan.filters is None or not plan.filters.is_screened:
        return None
    from data_prep.screening import Screening

    capped = {number for number, source in enumerate(plan.sources) if source.max_documents or plan.skip_failed}
    return Screening(plan.filters, capped)


def make_jobs(
    plan: Plan,
    stream: Stream,
    tokenizer: TokenizerInfo,
    encoder: EncoderChoice,
    threshold: int,
    screening: Screening | None = None,
) -> Iterator[Job | None]:
    """The stream's units with all that their results depend on, lazily; None as in `Stream.units`.

    With `screening`, each unit twice: first to be screened, then to be encoded with what was decided about it.
    """

    def fetch(job: Job) -> bool:
        """Have here what a job is made of, unless an earlier attempt finished it; False where its source fails."""
        is_far = any(stream.downloads.is_remote(piece.file) for piece in job.unit.pieces)
        try:
            if is_far and load_result(job) is None:
                stream.downloads.fetch_unit(job.unit.pieces)
        except UserError as error:
            stream.fail(job.unit.source, error)
            return False
        return True

    def jobs_of(units: Iterator[Unit | None]) -> Iterator[Job | None]:
        for unit in _with_few_files(units, stream.downloads):
            yield None if unit is None else make_job(plan, stream, unit, tokenizer, encoder, threshold)

    if screening is None:
        return (job for job in jobs_of(stream.units()) if job is None or fetch(job))
    is_capped = plan.max_docs or plan.max_tokens or any(source.max_documents for source in plan.sources)
    at_once = UNITS_AT_ONCE_CAPPED if is_capped else UNITS_AT_ONCE
    return screening.weave(jobs_of(stream.official_units()), jobs_of(stream.units()), at_once, fetch)


def _with_few_files(units: Iterator[Unit | None], downloads: Downloads) -> Iterator[Unit | None]:
    """The units, with a None (see `Stream.units`) wherever more than FILES_AT_ONCE files would lie here."""
    begun: set[int] = set()  # far files whose units may not all be done
    for unit in units:
        first = None if unit is None else unit.pieces[0].file
        if unit is None:
            begun.clear()
        elif downloads.is_remote(first):
            if first not in begun and len(begun) == FILES_AT_ONCE:
                yield None  # then they are done, and removed
                begun.clear()
            begun.add(first)
        yield unit


def make_job(
    plan: Plan, stream: Stream, unit: Unit, tokenizer: TokenizerInfo, encoder: EncoderChoice, threshold: int
) -> Job:
    """A unit with all that its result depends on."""
    source = plan.sources[unit.source]
    reading = stream.reading(unit.source)
    is_skipped = source.entry.on_bad_record == "skip"
    unit_threshold = 0 if source.has_official_validation else threshold
    dtype = str(token_dtype(tokenizer.vocab_size))
    identities = [stream.files[piece.file][1].identity for piece in unit.pieces]
    of_reading = {"reading": asdict(reading)}  # not is_bad_skipped: it changes no unit without bad records
    if plan.filters is not None:
        of_reading["filters"] = [plan.filters.settings(), library_versions(plan.filters)]
    settings = {
        "tokenizer": tokenizer.sha256,
        "encoder": encoder.name,
        "compare_ids": encoder.compare_ids,
        "dtype": dtype,
        "threshold": unit_threshold,
        **of_reading,
    }
    return Job(
        unit=unit,
        key=unit.key(settings, identities),
        work=plan.work,
        tokenizer_folder=plan.tokenizer_folder,
        tokenizer=replace(tokenizer, source=None),  # hashable: a worker keeps its encoder by it
        dtype=dtype,
        threshold=unit_threshold,
        reading=reading,
        is_bad_skipped=is_skipped,
        is_fast=encoder.is_fast,
        disputed=encoder.disputed,
        compare_ids=encoder.compare_ids,
        filters=plan.filters,
        screen_key=unit.key({"screening": of_reading}, identities) if plan.filters else None,
    )
