"""The stream of documents, in order: every unit of every source, and where caps end it.

In: a plan with its files. Out: units for the workers, and from their results `Taken`, what of each unit is kept. Caps
are prefixes in source order, found by the running counts of finished units, so they too are the same for any number of
workers.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from data_prep.align import Taken, read_rows
from data_prep.arrays import to_numpy
from data_prep.buckets import Bucket, bucket_names
from data_prep.downloads import Downloads
from data_prep.encode import Job, UnitResult, run_name
from data_prep.errors import UserError
from data_prep.filter_settings import Filters
from data_prep.ledger import TRAIN, VALIDATION, Counts, count_rows
from data_prep.manifest import SPLITS
from data_prep.readers import Reading, read_records
from data_prep.sources import Source, SourceFile
from data_prep.spread import iter_spread_units, sample_units
from data_prep.units import Unit, iter_units, unit_size

MAX_PROBLEMS_SHOWN = 5


@dataclass
class Stream:
    """Units in order, and the caps.

    With `is_spread` the order is drawn instead of the sources'. With `skip_failed` a source that fails ends there, and
    `failed` says why.
    """

    sources: tuple[Source, ...]
    files: list[tuple[int, SourceFile]]  # (number of the source, file), in the order of documents/files.jsonl
    downloads: Downloads
    keep_columns: dict[str, str]
    max_tokens: int | None
    max_docs: int | None
    buckets: tuple[Bucket, ...] = ()
    filters: Filters | None = None
    is_spread: bool = False
    skip_failed: bool = False
    failed: dict[int, str] = field(default_factory=dict)
    counts: dict[int, list[Counts]] = field(default_factory=dict)  # by source, for each bucket or the one
    num_units_used: dict[int, int] = field(default_factory=dict)
    beyond_cap: dict[int, int] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)  # sources whose train documents are enough
    num_compared: int = 0  # ids of the fast encoder that the reference confirmed
    _line: int = 0  # records of the current file in front of the current unit

    def __post_init__(self) -> None:
        self.unit_bytes = unit_size(self.files)
        for number in range(len(self.sources)):
            self.counts[number] = [Counts() for _ in bucket_names(self.buckets)]
            self.num_units_used[number] = self.beyond_cap[number] = 0

    def units(self) -> Iterator[Unit | None]:
        """All units: source by source, train before an official validation split; none of a source that has enough.

        None asks to wait until all units so far were taken: only then is it known if a cap needs the next download.
        """
        for number, source in enumerate(self.sources):
            is_capped = source.max_documents or self.max_docs or self.max_tokens
            is_far = source.entry.path is None
            if is_capped and is_far and source.entry.document_start is None and not self.is_spread:
                units = self._units_file_by_file(number)
            else:
                units = self._units_of(number, "train")
            while number not in self.finished and (unit := self._next(units, number)) is not None:
                yield unit[0]
            units = self._units_of(number, "validation")
            while (unit := self._next(units, number)) is not None:
                yield unit[0]

    def _next(self, units: Iterator[Unit | None], number: int) -> tuple[Unit | None] | None:
        """The next unit of a source, in a tuple; None at its end, which is also where it fails."""
        if number in self.failed:
            return None
        try:
            return next(((unit,) for unit in units), None)
        except UserError as error:
            self.fail(number, error)
            return None

    def fail(self, number: int, error: UserError) -> None:
        """A source cannot be read on: the end of the preparation, unless failed sources may be left out.

        Raises:
            UserError: the error, with the source's name.
        """
        label = self.sources[number].label
        if not self.skip_failed:
            if len(self.sources) == 1:
                raise error
            raise UserError(
                f"source {label}: {error} Or leave out what cannot be read of a source with --skip-failed."
            ) from error
        if number not in self.failed:
            print(f"warning: source {label} failed and is left out from here on: {error}", file=sys.stderr, flush=True)
            self.failed[number] = str(error)

    def train_units(self, number: int) -> Iterator[Unit]:
        """The train units of one source, each with its files here; of one that fails those in front of it."""
        units = self._units_of(number, "train")
        while number not in self.failed:
            try:
                unit = next(units, None)
                if unit is None:
                    return
                self.downloads.fetch_unit(unit.pieces)
            except UserError:
                if not self.skip_failed:
                    raise
                return  # encoding meets it again, and notes it
            yield unit

    def source_units(self, number: int) -> Iterator[Unit]:
        """The train units of one source in its own order, whatever their order is here."""
        files = self._files_of(number, "train")
        return iter_units(self.sources[number], number, files, "train", self.downloads, self.unit_bytes)

    def official_units(self) -> Iterator[Unit]:
        """The units of the sources' official validation splits."""
        return (unit for number in range(len(self.sources)) for unit in self._units_of(number, "validation"))

    def sample_units(self, number: int, num_bytes: int, draw: Callable[[str], int]) -> list[Unit]:
        """Train units of a source for a sample of so many bytes: all, but of files elsewhere only as many as needed.

        Args:
            draw: a file's place in the order in which they are taken, by its name.
        """
        return sample_units(
            self.sources[number], number, self._files_of(number, "train"), self.downloads, num_bytes, draw
        )

    def reading(self, number: int) -> Reading:
        """How the source's records become documents."""
        entry = self.sources[number].entry
        return Reading(
            entry.text_column,
            tuple(self.keep_columns.items()),
            entry.document_start,
            self.sources[number].is_split_by_line,
            self.buckets,
            entry.tokenized,
        )

    def take(self, job: Job, result: UnitResult) -> Taken | None:
        """What of the next unit, in order, is kept; None if its source already had enough.

        Raises:
            UserError: its first bad record lies in front of the caps, and bad records are errors.
        """
        unit, number = job.unit, job.unit.source
        self._line = self._line if unit.continues_file else 0
        first_record, self._line = self._line, self._line + result.num_records
        if unit.split == "train" and number in self.finished:
            return None
        self.num_compared += result.num_compared
        counts = result.counts
        num_rows = num_read = counts[0].num_read
        if unit.split == "train":
            self.num_units_used[number] += 1
            num_rows = self._rows_within_caps(job, result)
        if num_rows < num_read:
            rows = read_rows(job.work, job.key)
            counts = count_rows(_first_rows(rows, num_rows), job.tokenizer.is_bos_written, self.buckets, self.filters)
            self.beyond_cap[number] += num_read - num_rows
        elif result.problem is not None and number not in self.finished:
            file, record, what = result.problem
            self.fail(number, UserError(self.describe_problem(file, record + first_record, what)))
            self.finished.add(number)
        num_tokens = {}
        for name, total, new in zip(bucket_names(self.buckets), self.counts[number], counts, strict=True):
            total.add(new)
            num_tokens |= {run_name(name, split): new.splits[split].num_tokens for split in SPLITS}
        return Taken(job.key, num_rows, first_record, num_tokens)

    def count_beyond_caps(self) -> dict[int, tuple[int, bool]]:
        """By source, the documents beyond its cap as far as known without reading them, and whether that is all."""
        known = {}
        for number, source in enumerate(self.sources):
            is_exact = True
            if number in self.failed or (number in self.finished and source.entry.path is None):
                is_exact = False  # what was not needed was not downloaded
            elif number in self.finished:
                for index, unit in enumerate(self._units_of(number, "train")):
                    if index >= self.num_units_used[number]:
                        is_exact &= unit.num_documents is not None
                        self.beyond_cap[number] += unit.num_documents or 0
            known[number] = (self.beyond_cap[number], is_exact)
        return known

    def describe_problem(self, file: int, record: int, what: str) -> str:
        """A bad record as an error message."""
        number, info = self.files[file]
        source = self.sources[number]
        path = f"{source.label}: {info.name}" if self.downloads.is_remote(file) else info.path
        is_lines = info.format.startswith("jsonl") or source.is_split_by_line
        where = path if what.startswith("the file") else f"{path}: {'line' if is_lines else 'record'} {record + 1}"
        return (
            f"{where}: {what}. Mend or remove it, or leave such records out with --on-bad-record skip, which "
            "counts them."
        )

    def check_readable(self) -> None:
        """Read everything once, up to the caps on documents, and report what is bad before anything is written.

        Raises:
            UserError: all problems, the first few spelled out.
        """
        problems: list[str] = []
        num_all = 0
        for number, source in enumerate(self.sources):
            num_here = line = 0
            for unit in self.train_units(number):
                first_record = line if unit.continues_file else 0
                last = -1
                for record in read_records(unit.pieces, self.reading(number)):
                    last = record.number
                    num_here += bool(record.text)
                    if record.problem is not None and source.entry.on_bad_record == "fail":
                        problems.append(
                            self.describe_problem(record.file, record.number + first_record, record.problem)
                        )
                    if (
                        num_here == source.max_documents
                        or num_all + num_here == self.max_docs
                        or len(problems) > MAX_PROBLEMS_SHOWN
                    ):
                        break
                else:
                    line = first_record + last + 1
                    continue
                break
            num_all += num_here
            if num_all == self.max_docs:
                break
        if problems:
            more = "\n... and more." if len(problems) > MAX_PROBLEMS_SHOWN else ""
            raise UserError("\n".join(problems[:MAX_PROBLEMS_SHOWN]) + more)

    def _units_file_by_file(self, number: int) -> Iterator[Unit | None]:
        for index, file in self._files_of(number, "train"):
            yield None
            yield from iter_units(
                self.sources[number], number, [(index, file)], "train", self.downloads, self.unit_bytes
            )

    def _units_of(self, number: int, split: str) -> Iterator[Unit]:
        where = (self.sources[number], number, self._files_of(number, split))
        if self.is_spread and split == "train":
            return iter_spread_units(*where, self.downloads, self.unit_bytes)
        return iter_units(*where, split, self.downloads, self.unit_bytes)

    def _files_of(self, number: int, split: str) -> list[tuple[int, SourceFile]]:
        return [
            (index, file) for index, (source, file) in enumerate(self.files) if source == number and file.split == split
        ]

    def _rows_within_caps(self, job: Job, result: UnitResult) -> int:
        """How many of the unit's records the caps leave; notes which sources now have enough."""
        number = job.unit.source
        done_here = _num_documents(self.counts[number], self.sources[number])
        done_all = sum(_num_documents(self.counts[n], source) for n, source in enumerate(self.sources))
        tokens_all = sum(_num_tokens(self.counts[n], source) for n, source in enumerate(self.sources))
        cap_here = self.sources[number].max_documents
        limits = [cap - done for cap, done in ((cap_here, done_here), (self.max_docs, done_all)) if cap is not None]
        docs_left = min(limits) if limits else None
        tokens_left = None if self.max_tokens is None else self.max_tokens - tokens_all
        num_documents = sum(each.splits[name].num_documents for each in result.counts for name in SPLITS)
        num_tokens = sum(each.splits[name].num_tokens for each in result.counts for name in SPLITS)
        is_cut_by_docs = docs_left is not None and num_documents >= docs_left
        is_cut_by_tokens = tokens_left is not None and num_tokens >= tokens_left
        if not is_cut_by_docs and not is_cut_by_tokens:
            return result.counts[0].num_read
        rows = read_rows(job.work, job.key)
        status = to_numpy(rows["status"])
        is_kept = (status == TRAIN) | (status == VALIDATION)
        docs = np.cumsum(is_kept)
        tokens = np.cumsum(np.where(is_kept, to_numpy(rows["num_tokens"]), 0), dtype=np.int64)
        ends = []  # the row of the last document, which is kept whole
        if is_cut_by_docs:
            ends.append(int(np.searchsorted(docs, docs_left)))
        if is_cut_by_tokens:
            ends.append(int(np.searchsorted(tokens, tokens_left)))
        end = min(ends)
        is_all_enough = (self.max_docs is not None and done_all + int(docs[end]) >= self.max_docs) or (
            tokens_left is not None and int(tokens[end]) >= tokens_left
        )
        self.finished |= set(range(len(self.sources))) if is_all_enough else {number}
        return end + 1


def _num_documents(counts: list[Counts], source: Source) -> int:
    """Documents that a cap counts: an official validation split is not part of the prefix."""
    names = ("train",) if source.has_official_validation else SPLITS
    return sum(each.splits[name].num_documents for each in counts for name in names)


def _num_tokens(counts: list[Counts], source: Source) -> int:
    names = ("train",) if source.has_official_validation else SPLITS
    return sum(each.splits[name].num_tokens for each in counts for name in names)


def _first_rows(rows: object, num_rows: int) -> dict[str, np.ndarray]:
    table = rows.slice(0, num_rows)
    own = ("status", "bucket", "num_tokens", "num_bytes", "num_characters")
    names = [name for name in table.column_names if name in own or name.startswith(("bytes_", "changed"))]
    return {name: to_numpy(table[name]) for name in names}
