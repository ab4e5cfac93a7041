"""The filters at work in a unit: records in, records out, with what became of each and samples of what was removed.

In: the records of a unit, batch by batch, and the `Decision` about the unit where one was needed. Out: changed texts,
a status for each record that is left out, and columns of the unit's table from which the ledger is counted: the bytes
of each text before the filters and after each that changes it. Of what was removed, the samples with the smallest
hashes are kept, so that they come from everywhere and are the same for any number of workers.
"""

from __future__ import annotations

import heapq
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from data_prep.decontamination import INDEX_NAME
from data_prep.duplicates import hash_bytes, remove_lines
from data_prep.errors import UserError
from data_prep.filter_settings import NOTHING_LEFT, Filters
from data_prep.filters import Chain, Outcome
from data_prep.ledger import FIRST_RULE, TRAIN
from data_prep.readers import Record

if TYPE_CHECKING:
    from data_prep.encode import Job

SAMPLES = "samples"  # the `run_name` of the file of a unit's samples
NUM_SAMPLES = 8  # for each rule, and each filter that changes texts
SAMPLE_CHARACTERS = 400
_chains: dict[tuple[str, Path], Chain] = {}  # of this process: the models behind them take a moment to load


def filter_columns(filters: Filters | None) -> list[tuple[str, pa.DataType]]:
    """The columns that filters add to a unit's table: bytes before them all and after each that changes texts."""
    if filters is None:
        return []
    after = [(f"bytes_after_{name}", pa.uint32()) for name in filters.changing]
    return [("bytes_before", pa.uint32()), *after, ("changed", pa.uint8())]  # a bit for each that changed it


class Sieve:
    """Applies the filters of a job to its records, in order. An official validation split passes unchanged."""

    def __init__(self, job: Job):
        self.job = job
        self.filters = job.filters
        self.is_active = job.unit.split == "train"
        self.chain = _load_chain(job.filters, job.work / INDEX_NAME) if self.is_active else None
        self.codes = {rule: FIRST_RULE + number for number, rule in enumerate(job.filters.rules)}
        self.rules = {code: rule for rule, code in self.codes.items()}
        self.is_code = {piece.file: piece.format == "python" for piece in job.unit.pieces}
        self.decided: np.ndarray | None = None
        self.lines: dict[int, set[int]] = {}
        if job.decision is not None:
            self.decided = np.frombuffer(job.decision.status, dtype=np.uint8)
            for row, line in np.frombuffer(job.decision.lines, dtype=np.uint32).reshape(-1, 2).tolist():
                self.lines.setdefault(row, set()).add(line)
        self.num_rows = 0
        self.samples: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}
        self.ngrams: list[tuple[int, list[int]]] = []  # row, hashes of evaluation n-grams

    def apply(self, records: list[Record], is_kept: np.ndarray, status: np.ndarray) -> dict[str, np.ndarray]:
        """Filter the next records: change their texts, `is_kept` and `status` in place; the columns."""
        names = self.filters.changing
        before = np.array([len((record.text or "").encode()) for record in records], dtype=np.uint32)
        after = {name: before.copy() for name in names}
        changed = np.zeros(len(records), dtype=np.uint8)
        for i in np.flatnonzero(is_kept) if self.is_active else ():
            outcome = self._run(records[i], self.num_rows + int(i))
            for name, _, text in outcome.changes:
                changed[i] |= 1 << names.index(name)
                for later in names[names.index(name) :]:
                    after[later][i] = len(text.encode())
            if outcome.rule is not None:
                is_kept[i], status[i] = False, self.codes[outcome.rule]
            self._note(self.num_rows + int(i), outcome)
            records[i].text = outcome.text
        self.num_rows += len(records)
        return {"bytes_before": before, **{f"bytes_after_{name}": after[name] for name in names}, "changed": changed}

    def dump(self, buckets: np.ndarray) -> str:
        """The samples and the n-grams that were found, as JSON.

        Args:
            buckets: The bucket of each record.
        """
        samples = [
            {"rule": rule, "hash": -number, "row": row, "bucket": int(buckets[row]), **sample}
            for rule, best in sorted(self.samples.items())
            for number, row, sample in sorted(best, key=lambda each: (-each[0], each[1]))
        ]
        ngrams = [{"row": row, "bucket": int(buckets[row]), "ngrams": found} for row, found in self.ngrams]
        return json.dumps({"samples": samples, "ngrams": ngrams})

    def _run(self, record: Record, row: int) -> Outcome:
        is_decided = self.decided is not None
        rule = None
        if is_decided and self.decided[row] != TRAIN:
            rule = self.rules[int(self.decided[row])]
        text = record.text
        try:
            outcome = self.chain.run(text, self.is_code.get(record.file, False), rule, is_decided)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # whatever a rule of a foreign library raises: it names the document
            path = next(piece.path for piece in self.job.unit.pieces if piece.file == record.file)
            raise UserError(
                f"{path}: a filter failed over record {record.number + 1} of what starts there at "
                f"{self.job.unit.pieces[0].start:,} ({type(error).__name__}: {error}). It begins {text[:60]!r}. "
                "Nothing is left out silently: change the filter's options, or mend the record."
            ) from error
        if outcome.rule is None and rule is not None:
            outcome.rule = rule
        if outcome.rule is None and row in self.lines:
            after = remove_lines(outcome.text, self.lines[row])
            if after.strip():
                outcome.changes.append(("duplicate_lines", outcome.text, after))
                outcome.text = after
            else:
                outcome.rule = f"duplicate_lines: {NOTHING_LEFT}"
        return outcome

    def _note(self, row: int, outcome: Outcome) -> None:
        """Keep what happened as a sample where its hash is among the smallest."""
        if outcome.ngrams:
            self.ngrams.append((row, outcome.ngrams))
        if outcome.rule is not None:
            self._keep(outcome.rule, row, outcome.text, None)
        else:
            for name, before, after in outcome.changes:
                self._keep(name, row, before, after)

    def _keep(self, rule: str, row: int, before: str, after: str | None) -> None:
        best = self.samples.setdefault(rule, [])
        number = -hash_bytes(before.encode())
        if len(best) == NUM_SAMPLES and number <= best[0][0]:
            return
        shown = {"text": before[:SAMPLE_CHARACTERS]} if after is None else dict(_difference(before, after))
        if rule == "pii":
            shown["before"] = _hide(shown["before"], shown["after"])
        (heapq.heappushpop if len(best) == NUM_SAMPLES else heapq.heappush)(best, (number, row, shown))


def _load_chain(filters: Filters, index: Path) -> Chain:
    key = (json.dumps(filters.settings()), index)
    if key not in _chains:
        _chains.clear()
        _chains[key] = Chain(filters, index)
    return _chains[key]


def _difference(before: str, after: str) -> list[tuple[str, str]]:
    """A window of both texts around the first place where they differ."""
    pairs = enumerate(zip(before, after, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
    start = max(first - SAMPLE_CHARACTERS // 4, 0)
    return [(name, text[start : start + SAMPLE_CHARACTERS]) for name, text in (("before", before), ("after", after))]


def _hide(before: str, after: str) -> str:
    """What was masked, each word as its first letter, so that a sample does not hold what the text must not."""
    words = set(re.findall(r"\S+", after))

    def hide(word: re.Match) -> str:
        return word[0] if word[0] in words else word[0][0] + re.sub(r"\w", "x", word[0][1:])

    return re.sub(r"\S+", hide, before)
