"""A plan turned into work: its stream of units, and each unit with all that its result depends on.

In: a `Plan` and its files. Out: the `Stream`, and `Job`s whose keys are equal exactly when input and settings are.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace

from data_prep.encode import Job
from data_prep.encoder import EncoderChoice
from data_prep.hub import download_file
from data_prep.manifest import TokenizerInfo, token_dtype
from data_prep.plan import Plan
from data_prep.sources import SourceFile
from data_prep.stream import Stream


def make_stream(plan: Plan, files: list[tuple[int, SourceFile]]) -> Stream:
    """The plan's stream; files of the Hub are downloaded when they are first read."""
    paths: dict[int, str] = {}

    def fetch(index: int) -> str:
        if index not in paths:
            number, file = files[index]
            paths[index] = file.path or download_file(plan.sources[number].entry, file)
        return paths[index]

    return Stream(plan.sources, files, fetch, plan.keep_columns, plan.max_tokens, plan.max_docs, plan.buckets)


def make_jobs(
    plan: Plan, stream: Stream, tokenizer: TokenizerInfo, encoder: EncoderChoice, threshold: int
) -> Iterator[Job | None]:
    """The stream's units with all that their results depend on, lazily; None as in `Stream.units`."""
    identities = [file.identity for _, file in stream.files]
    dtype = str(token_dtype(tokenizer.vocab_size))
    for unit in stream.units():
        if unit is None:
            yield None
            continue
        source = plan.sources[unit.source]
        reading = stream.reading(unit.source)
        is_skipped = source.entry.on_bad_record == "skip"
        unit_threshold = 0 if source.has_official_validation else threshold
        settings = {
            "tokenizer": tokenizer.sha256,
            "encoder": encoder.name,
            "compare_ids": encoder.compare_ids,
            "dtype": dtype,
            "threshold": unit_threshold,
            "is_bad_skipped": is_skipped,
            "reading": asdict(reading),
        }
        yield Job(
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
        )
