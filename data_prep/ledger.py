"""The ledger: what became of every document, byte and token, by source; and the proof that it adds up.

In: the counts of units. Out: the manifest's `ledger`, and a table. Read = empty + bad + filtered + train + validation;
text tokens + separators = tokens; tokens of all sources + padding = positions in blocks + one remainder per split. A
packing has either padding or a remainder.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.buckets import Bucket, column_names
from data_prep.filter_settings import Filters, rule_filter
from data_prep.manifest import SPLITS, SplitInfo
from data_prep.sizes import format_bytes, format_count, format_table

# What became of a record: the `status` column of a unit's table. The last two only where there are buckets.
TRAIN, VALIDATION, EMPTY, BAD, NO_BUCKET, NO_VALUE = range(6)
FIRST_RULE = 16  # and those from here on: left out by the rule of this number among `Filters.rules`
NO_BUCKET_RULE = "in no bucket"
FILTERED = "filtered"  # the column for all filters together; data_prep/removed.py shows each


class LedgerError(Exception):
    """The counts do not add up: our mistake, never the user's. Exit code 1."""


@dataclass
class SplitCounts:
    """What one source, or unit, gives to one split."""

    num_documents: int = 0
    num_bytes: int = 0
    num_characters: int = 0
    num_text_tokens: int = 0
    num_bos: int = 0
    num_eos: int = 0
    num_tokens: int = 0  # counted apart from the three above: what was written

    def add(self, other: "SplitCounts") -> None:
        """Add the other's counts to these."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Counts:
    """What became of the documents of one source, or unit, in one bucket."""

    num_read: int = 0
    num_empty: int = 0
    num_bad: int = 0
    num_filtered: dict[str, int] = field(default_factory=dict)  # by rule; empty without buckets and filters
    filters: dict[str, dict[str, int]] = field(default_factory=dict)  # of each, documents and bytes before and after
    splits: dict[str, SplitCounts] = field(default_factory=lambda: {name: SplitCounts() for name in SPLITS})

    def add(self, other: "Counts") -> None:
        """Add the other's counts to these."""
        self.num_read += other.num_read
        self.num_empty += other.num_empty
        self.num_bad += other.num_bad
        for rule, num in other.num_filtered.items():
            self.num_filtered[rule] = self.num_filtered.get(rule, 0) + num
        for name, flow in other.filters.items():
            known = self.filters.setdefault(name, dict.fromkeys(flow, 0))
            self.filters[name] = {key: known[key] + value for key, value in flow.items()}
        for name in SPLITS:
            self.splits[name].add(other.splits[name])


def no_value_rule(buckets: tuple[Bucket, ...]) -> str:
    """How the ledger calls documents that are in no bucket because a column has no value: `no score`."""
    return f"no {' or '.join(column_names(buckets))}"


def count_rows(
    rows: dict[str, np.ndarray], is_bos_written: bool, buckets: tuple[Bucket, ...], filters: Filters | None = None
) -> list[Counts]:
    """The counts of the rows of a unit's table (or of the first of them), for each bucket; without buckets one."""
    status = rows["status"]
    is_text = (status <= VALIDATION) | (status >= FIRST_RULE)
    read = (len(status), int((status == EMPTY).sum()), int((status == BAD).sum()))
    if not buckets:
        counts = _count_splits(Counts(*read), rows, status, is_bos_written)
        return [_count_filters(counts, rows, is_text, filters) if filters is not None else counts]
    in_bucket = [is_text & (rows["bucket"] == number) for number in range(len(buckets))]
    in_none = {
        NO_BUCKET_RULE: int((status == NO_BUCKET).sum()),
        no_value_rule(buckets): int((status == NO_VALUE).sum()),
    }
    all_counts = []
    for number, is_here in enumerate(in_bucket):
        others = {
            f"in {bucket.name}": int(in_bucket[other].sum()) for other, bucket in enumerate(buckets) if other != number
        }
        here = np.where(is_here, status, NO_BUCKET)
        counts = _count_splits(Counts(*read, {**others, **in_none}), rows, here, is_bos_written)
        all_counts.append(_count_filters(counts, rows, is_here, filters) if filters is not None else counts)
    return all_counts


def _count_filters(counts: Counts, rows: dict[str, np.ndarray], is_here: np.ndarray, filters: Filters) -> Counts:
    """Documents and bytes before and after each filter, in order, and the documents by rule that left them out."""
    rules = filters.rules
    status, num_bytes = rows["status"], rows["bytes_before"].astype(np.int64)
    for name in filters.options:
        flow = {"documents_before": int(is_here.sum()), "bytes_before": int(num_bytes[is_here].sum())}
        for number, rule in enumerate(rules):
            if rule_filter(rule) == name:
                is_out = is_here & (status == FIRST_RULE + number)
                if is_out.any():
                    counts.num_filtered[rule] = int(is_out.sum())
                is_here = is_here & ~is_out
        is_changed = np.zeros(len(status), dtype=bool)
        if name in filters.changing:
            num_bytes = rows[f"bytes_after_{name}"].astype(np.int64)
            is_changed = is_here & (rows["changed"] >> filters.changing.index(name) & 1 == 1)
        counts.filters[name] = {
            **flow,
            "documents_changed": int(is_changed.sum()),
            "documents_after": int(is_here.sum()),
            "bytes_after": int(num_bytes[is_here].sum()),
        }
    return counts


def _count_splits(counts: Counts, rows: dict[str, np.ndarray], status: np.ndarray, is_bos_written: bool) -> Counts:
    for code, name in ((TRAIN, "train"), (VALIDATION, "validation")):
        here = status == code
        num_documents, num_tokens = int(here.sum()), int(rows["num_tokens"][here].sum(dtype=np.int64))
        num_bos = num_documents * is_bos_written
        counts.splits[name] = SplitCounts(
            num_documents,
            int(rows["num_bytes"][here].sum(dtype=np.int64)),
            int(rows["num_characters"][here].sum(dtype=np.int64)),
            num_tokens - num_documents - num_bos,
            num_bos,
            num_documents,
            num_tokens,
        )
    return counts


def ledger_entry(
    counts: Counts,
    beyond_cap: int,
    is_beyond_exact: bool,
    num_files: int,
    ignored: dict[str, int],
    failed: str | None = None,
) -> dict[str, Any]:
    """One source's entry of the manifest's ledger; `failed` says why it ends where it does, with --skip-failed."""
    return {
        "documents": {
            "read": counts.num_read,
            "empty": counts.num_empty,
            "bad": counts.num_bad,
            "filtered": counts.num_filtered,
            "train": counts.splits["train"].num_documents,
            "validation": counts.splits["validation"].num_documents,
            "beyond_cap": beyond_cap,
            "is_beyond_cap_exact": is_beyond_exact,
        },
        **({"filters": counts.filters} if counts.filters else {}),
        **{name: vars(counts.splits[name]) for name in SPLITS},
        "files": {"read": num_files, "ignored": ignored},
        **({"failed": failed} if failed is not None else {}),
    }


def find_imbalances(ledger: dict[str, dict[str, Any]], splits: dict[str, SplitInfo], block_size: int) -> list[str]:
    """Every equation of the ledger that does not hold, as a sentence; empty when all is accounted for."""
    problems = []
    for source, entry in ledger.items():
        documents = entry["documents"]
        kept = documents["empty"] + documents["bad"] + documents["train"] + documents["validation"]
        kept += sum(documents.get("filtered", {}).values())
        if documents["read"] != kept:
            problems.append(f"{source}: {documents['read']} documents read but {kept} accounted for")
        problems += [f"{source}: {problem}" for problem in _find_filter_imbalances(entry)]
        for name in SPLITS:
            counts = entry[name]
            parts = counts["num_text_tokens"] + counts["num_bos"] + counts["num_eos"]
            if parts != counts["num_tokens"]:
                problems.append(f"{source}/{name}: {parts} tokens made but {counts['num_tokens']} written")
            if not counts["num_documents"] == counts["num_eos"] == documents[name]:
                problems.append(
                    f"{source}/{name}: {counts['num_documents']} documents but {counts['num_eos']} ends of document"
                )
    for name, split in splits.items():
        for key in ("num_documents", "num_bytes", "num_tokens"):
            total = sum(entry[name][key] for entry in ledger.values())
            if total != getattr(split, key):
                problems.append(f"{name}: {key} is {getattr(split, key)} but the sources give {total}")
        num_positions = split.num_blocks * block_size
        if (
            num_positions + split.remainder_tokens != split.num_tokens + split.num_padding_tokens
            or not 0 <= split.remainder_tokens < block_size
            or (split.num_padding_tokens and (split.remainder_tokens or split.lengths_sha256 is None))
        ):
            problems.append(
                f"{name}: {split.num_blocks} blocks and {split.remainder_tokens} left are not {split.num_tokens} tokens"
                f" and {split.num_padding_tokens} of padding"
            )
        if sum(shard.num_blocks for shard in split.shards) != split.num_blocks:
            problems.append(f"{name}: the shards do not hold {split.num_blocks} blocks")
    return problems


def _find_filter_imbalances(entry: dict[str, Any]) -> Iterator[str]:
    """What goes into a filter came out of the one before, and what does not come out was left out by its rules."""
    filters, filtered = entry.get("filters", {}), entry["documents"]["filtered"]
    before = None
    for name, flow in filters.items():
        num_out = sum(num for rule, num in filtered.items() if rule_filter(rule) == name)
        if flow["documents_before"] - num_out != flow["documents_after"]:
            num_in, num_on = flow["documents_before"], flow["documents_after"]
            yield f"{name} read {num_in} documents, left out {num_out} and gave {num_on}"
        now = (flow["documents_before"], flow["bytes_before"])
        if before not in (None, now):
            yield f"{name} read {now} documents and bytes but {before} came out of the filter in front"
        before = (flow["documents_after"], flow["bytes_after"])
    written = tuple(sum(entry[name][key] for name in SPLITS) for key in ("num_documents", "num_bytes"))
    if before not in (None, written):
        yield f"{before} documents and bytes came out of the last filter but {written} are written"


def describe_ledger(ledger: dict[str, dict[str, Any]], splits: dict[str, SplitInfo], block_size: int) -> str:
    """The ledger as a table for people, and its equation."""
    filters = list(dict.fromkeys(name for entry in ledger.values() for name in entry.get("filters", {})))
    found = dict.fromkeys(rule for entry in ledger.values() for rule in entry["documents"]["filtered"])
    rules = [*(rule for rule in found if rule_filter(rule) not in filters), *([FILTERED] if filters else [])]
    head = ("source", "read", "empty", "bad", *rules, "beyond cap", *SPLITS, "text", "tokens", "bytes/token")
    lines = [head]
    for source, entry in ledger.items():
        documents = entry["documents"]
        num_bytes, num_tokens = (sum(entry[name][key] for name in SPLITS) for key in ("num_bytes", "num_tokens"))
        beyond = f"{documents['beyond_cap']:,}" + ("" if documents["is_beyond_cap_exact"] else "+")
        numbers = [f"{documents[key]:,}" for key in ("read", "empty", "bad")]
        by_rule: Counter = Counter()
        for rule, num in documents["filtered"].items():
            by_rule[FILTERED if rule_filter(rule) in filters else rule] += num
        numbers += [f"{by_rule[rule]:,}" for rule in rules]
        kept = [f"{documents[key]:,}" for key in SPLITS]
        ratio = f"{num_bytes / num_tokens:.2f}" if num_tokens else "-"
        lines.append((source, *numbers, beyond, *kept, format_bytes(num_bytes), format_count(num_tokens), ratio))
    rows = format_table(lines)
    for source, entry in ledger.items():
        if "failed" in entry:
            rows.append(f"{source}: FAILED after {entry['documents']['read']:,} documents: {entry['failed']}")
    for name, split in splits.items():
        is_packed = split.lengths_sha256 is not None
        rest = f"- {split.num_padding_tokens:,} of padding" if is_packed else f"+ {split.remainder_tokens:,} left over"
        rows.append(f"{name}: {split.num_tokens:,} tokens = {split.num_blocks:,} blocks x {block_size:,} {rest}")
        rows += [f"  {line}" for line in describe_packing(split, block_size)]
    return "\n".join(rows)


def describe_packing(split: SplitInfo, block_size: int) -> list[str]:
    """What the blocks of a split cost: padding, and documents that are cut."""
    lines = []
    if split.lengths_sha256 is not None:
        share = split.num_padding_tokens / max(1, split.num_blocks * block_size)
        lines.append(f"padding: {split.num_padding_tokens:,} positions, {100 * share:.3f} % of all")
    if split.num_cut is not None and split.num_documents:
        lines.append(
            f"cut by a block's border: {split.num_cut:,} of {split.num_documents:,} documents "
            f"({100 * split.num_cut / split.num_documents:.2f} %; {split.num_long:,} are longer than a block)"
        )
    return lines
