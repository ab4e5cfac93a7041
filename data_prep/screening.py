"""Screening: what is decided by more than one document, decided before anything is encoded.

In: the units of all sources, in order. Out: for each unit a `Decision`: which of its documents the filters leave out,
duplicates included, and which lines. Of equal or nearly equal documents the first in the order of the sources stays,
wherever the hash of its text puts it; so no document of validation has a near-duplicate in train, a decision depends
only on what lies in front, and the same holds for any number of workers, for caps, and for a corpus that grows. An
official validation split comes first, and nothing of it is left out.

A worker turns a unit into <key>.screen.bin: a status for each record, and the hashes. The main process goes through
these in order. The unit is encoded with its decision when that is known.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.duplicates import Seen, hash_bands, hash_bytes, hash_lines
from data_prep.filter_settings import Filters
from data_prep.ledger import BAD, EMPTY, FIRST_RULE, TRAIN, Counts

if TYPE_CHECKING:
    from data_prep.encode import Job, UnitResult

SCREEN = "screen"


@dataclass(frozen=True)
class Decision:
    """What of a unit stays: the status of each record (TRAIN: it stays), and pairs of a record and a line to remove."""

    status: bytes  # uint8
    lines: bytes  # uint32, pairs

    def digest(self) -> str:
        """A hash of it, for the key of the unit's result."""
        return hashlib.blake2b(self.status + b"/" + self.lines, digest_size=16).hexdigest()


def screen_unit(job: Job) -> UnitResult:
    """Run the filters on one unit and leave its hashes in the working folder."""
    from data_prep.encode import UnitResult, iter_batches, sort_into_buckets
    from data_prep.sieve import Sieve

    options = job.filters.options
    has_lines = "duplicate_lines" in options
    sieve = Sieve(job)
    status, exact, bands, has_bands, lines = [], [], [], [], []
    num_records = num_rows = 0
    problem = None
    for batch in iter_batches(job):
        num_records, records, problem = batch
        is_kept = np.array([record.problem is None and record.text != "" for record in records], dtype=bool)
        here = np.array([BAD if record.problem is not None else EMPTY for record in records], dtype=np.uint8)
        here[is_kept] = TRAIN
        if job.reading.buckets:
            sort_into_buckets(records, job.reading, is_kept, here, np.zeros(len(records), dtype=np.uint16))
        sieve.apply(records, is_kept, here)
        for i in np.flatnonzero(is_kept):
            text = records[i].text
            exact.append(hash_bytes(text.encode()))
            if "near_duplicates" in options:
                keys = hash_bands(text, options["near_duplicates"])
                has_bands.append(keys is not None)
                bands += [keys] if keys is not None else []
            if has_lines and (options["duplicate_lines"]["code"] or not sieve.is_code[records[i].file]):
                found = hash_lines(text, options["duplicate_lines"]["min_characters"])
                lines += [(num_rows + i, line, number) for line, number in found]
        status.append(here)
        num_rows += len(here)
    path = _screen_path(job)
    temporary = path.with_suffix(f".{os.getpid()}.npz")
    num_bands = options.get("near_duplicates", {}).get("num_buckets", 0)
    np.savez(
        temporary,
        status=np.concatenate([np.empty(0, dtype=np.uint8), *status]),
        exact=np.array(exact, dtype=np.uint64),
        has_bands=np.array(has_bands, dtype=bool),
        bands=np.array(bands, dtype=np.uint64).reshape(len(bands), num_bands),
        line_places=np.array([place[:2] for place in lines], dtype=np.uint32).reshape(-1, 2),
        lines=np.array([place[2] for place in lines], dtype=np.uint64),
    )
    os.replace(temporary, path)
    result = UnitResult(job.key, num_records, [Counts()], problem, {SCREEN: path.stat().st_size}, 0)
    marker = job.work / f"{job.key}.{os.getpid()}.json.tmp"
    marker.write_text(json.dumps(asdict(result)), encoding="utf-8")
    os.replace(marker, job.work / f"{job.key}.json")
    return result


class Screening:
    """The decisions so far, and the jobs that wait for theirs.

    Args:
        capped: The numbers of sources with a cap of their own: what lies beyond is no duplicate of anything.
    """

    def __init__(self, filters: Filters, capped: set[int]):
        self.filters = filters
        self.rules = filters.rules
        self.capped = capped
        self.decisions: dict[str, Decision] = {}  # by the screened unit's key, until it is handed on
        num_bands = filters.options.get("near_duplicates", {}).get("num_buckets", 0)
        self.seen = [Seen() for _ in range(2 + num_bands)]  # documents, lines, bands
        self._mark: list[list[np.ndarray]] = []  # what was seen in front of the current capped source
        self._settled: list[tuple[Path, int]] = []  # its units, and how many of their records the caps leave

    def take(self, job: Job) -> None:
        """Decide about the next unit, in order."""
        decision = self._decide(_screen_path(job), None)
        if job.unit.split == "train":
            self.decisions[job.key] = decision

    def settle(self, job: Job, num_rows: int) -> None:
        """Note how many records of an encoded unit the caps leave."""
        if job.unit.source in self.capped and job.unit.split == "train":
            self._settled.append((_screen_path(_screened(job)), num_rows))

    def weave(self, official: Iterator[Job], jobs: Iterator[Job | None], at_once: int) -> Iterator[Job | None]:
        """The jobs, each unit screened before it is encoded; None asks to wait until all so far were taken.

        Args:
            official: Those of official validation splits, once more, which everything else is compared with.
            at_once: How many are screened at once; it never changes the result.
        """
        yield from (_screened(job) for job in official)
        waiting: list[Job] = []  # screened, not yet encoded
        new: list[Job] = []  # being screened
        source = None
        for job in jobs:
            is_next_source = job is not None and job.unit.split == "train" and job.unit.source != source
            if job is None or is_next_source:
                yield None
                yield from map(self._decided, [*waiting, *new])
                yield None
                waiting, new = [], []
            if is_next_source:
                self._begin_source(job.unit.source, source)
                source = job.unit.source
            if job is None:
                continue
            if job.unit.split == "train":
                yield _screened(job)
            new.append(job)
            if len(new) == at_once:
                if not all(self._is_decided(each) for each in waiting):
                    yield None
                yield from map(self._decided, waiting)
                waiting, new = new, []
        yield None
        yield from map(self._decided, [*waiting, *new])

    def _begin_source(self, number: int, previous: int | None) -> None:
        """Forget what lies beyond the cap of the source in front."""
        if previous in self.capped:
            for seen, runs in zip(self.seen, self._mark, strict=True):
                seen.runs = runs
            for path, num_rows in self._settled:
                self._decide(path, num_rows)
        if number in self.capped:
            self._mark = [list(seen.runs) for seen in self.seen]
        self._settled = []

    def _decide(self, path: Path, num_rows: int | None) -> Decision:
        """Go through a unit, or its first records, in order."""
        with np.load(path) as file:
            unit = dict(file)
        documents, lines, *bands = self.seen
        status = unit["status"].copy()
        rows = np.flatnonzero(status == TRAIN)
        places = unit["line_places"]
        if num_rows is not None:
            num = int(np.searchsorted(rows, num_rows))
            num_with_bands = int(unit["has_bands"][:num].sum())
            num_lines = int(np.searchsorted(places[:, 0], num_rows))
            rows, places = rows[:num], places[:num_lines]
            for name, end in (("exact", num), ("has_bands", num), ("bands", num_with_bands), ("lines", num_lines)):
                unit[name] = unit[name][:end]
        if "exact_duplicates" in self.filters.options:
            status[rows[documents.add(unit["exact"])]] = self._code("exact_duplicates")
        if bands:
            rows_here = rows[unit["has_bands"]]
            is_near = np.zeros(len(rows_here), dtype=bool)
            for seen, keys in zip(bands, unit["bands"].T, strict=True):
                is_near |= seen.add(keys)
            status[rows_here[is_near & (status[rows_here] == TRAIN)]] = self._code("near_duplicates")
        is_there = status[places[:, 0]] == TRAIN  # the lines of a duplicate are no reason to remove others
        places = places[is_there]
        places = places[lines.add(unit["lines"][is_there])]
        return Decision(status.tobytes(), places.tobytes())

    def _is_decided(self, job: Job) -> bool:
        return job.unit.split != "train" or job.screen_key in self.decisions

    def _decided(self, job: Job) -> Job:
        if job.unit.split != "train":
            return job
        decision = self.decisions.pop(job.screen_key)
        key = hashlib.blake2b(f"{job.key} {decision.digest()}".encode(), digest_size=16).hexdigest()
        return replace(job, key=key, decision=decision)

    def _code(self, rule: str) -> int:
        return FIRST_RULE + self.rules.index(rule)


def _screen_path(job: Job) -> Path:
    from data_prep.encode import run_path

    return run_path(job.work, job.key, SCREEN)


def _screened(job: Job) -> Job:
    return replace(job, key=job.screen_key, is_screening=True)
