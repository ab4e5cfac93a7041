"""A plan turned into work: its stream of units, and each unit with all that its result depends on.

In: a `Plan` and its files. Out: the `Stream`, and `Job`s whose keys are equal exactly when input and settings are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from data_prep.encode import Job
from data_prep.encoder import EncoderChoice
from data_prep.filter_settings import library_versions
from data_prep.hub import download_file
from data_prep.manifest import TokenizerInfo, token_dtype
from data_prep.plan import Plan
from data_prep.sources import SourceFile
from data_prep.stream import Stream
from data_prep.units import Unit

if TYPE_CHECKING:
    from data_prep.screening import Screening

UNITS_AT_ONCE = 32  # are screened before the first of them is encoded, while those in front are
UNITS_AT_ONCE_CAPPED = 4  # what lies beyond a cap is screened for nothing


def make_stream(plan: Plan, files: list[tuple[int, SourceFile]]) -> Stream:
    """The plan's stream; files of the Hub are downloaded when they are first read."""
    paths: dict[int, str] = {}

    def fetch(index: int) -> str:
        if index not in paths:
            number, file = files[index]
            paths[index] = file.path or download_file(plan.sources[number].entry, file)
        return paths[index]

    return Stream(
        plan.sources, files, fetch, plan.keep_columns, plan.max_tokens, plan.max_docs, plan.buckets, plan.filters
    )


def make_screening(plan: Plan) -> Screening | None:
    """Where a plan's filters look at more than one document, what decides about each unit."""
    if plan.filters is None or not plan.filters.is_screened:
        return None
    from data_prep.screening import Screening

    return Screening(plan.filters, {number for number, source in enumerate(plan.sources) if source.max_documents})


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
    identities = [file.identity for _, file in stream.files]

    def make_job(unit: Unit) -> Job:
        return _make_job(plan, stream, unit, identities, tokenizer, encoder, threshold)

    jobs = (unit if unit is None else make_job(unit) for unit in stream.units())
    if screening is None:
        return jobs
    is_capped = plan.max_docs or plan.max_tokens or any(source.max_documents for source in plan.sources)
    official = (make_job(unit) for unit in stream.official_units())
    return screening.weave(official, jobs, UNITS_AT_ONCE_CAPPED if is_capped else UNITS_AT_ONCE)


def _make_job(
    plan: Plan,
    stream: Stream,
    unit: Unit,
    identities: list[str],
    tokenizer: TokenizerInfo,
    encoder: EncoderChoice,
    threshold: int,
) -> Job:
    source = plan.sources[unit.source]
    reading = stream.reading(unit.source)
    is_skipped = source.entry.on_bad_record == "skip"
    unit_threshold = 0 if source.has_official_validation else threshold
    dtype = str(token_dtype(tokenizer.vocab_size))
    of_reading = {"is_bad_skipped": is_skipped, "reading": asdict(reading)}
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
        compare_ids=encoder.compare_ids,
        filters=plan.filters,
        screen_key=unit.key({"screening": of_reading}, identities) if plan.filters else None,
    )
