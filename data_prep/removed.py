"""What filters left out and changed: the lists beside a prepared dataset, and how a person looks at them.

Out of preparation come documents/removed.arrow, one row for each document that a filter left out (source file, record,
rule, bytes), documents/samples.jsonl, a few of each rule and of each change as text, and with `decontaminate`
documents/contaminated.jsonl. In: a prepared dataset. Out: lines for people.
"""

import difflib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.align import Taken, read_rows
from data_prep.arrays import from_numpy, to_numpy
from data_prep.decontamination import mark_items
from data_prep.documents import files_path
from data_prep.encode import run_path
from data_prep.errors import UserError
from data_prep.filter_settings import Filters, library_versions, rule_filter
from data_prep.ledger import FIRST_RULE, Counts
from data_prep.manifest import Manifest, load_manifest, sha256_of
from data_prep.output import write_whole
from data_prep.paths import check_command
from data_prep.sizes import format_bytes, format_table

REMOVED, SAMPLES, CONTAMINATED = "documents/removed.arrow", "documents/samples.jsonl", "documents/contaminated.jsonl"
NUM_SAMPLES = 8
SCHEMA = pa.schema([("source", pa.uint32()), ("record", pa.uint64()), ("rule", pa.uint8()), ("num_bytes", pa.uint32())])


def write_removed(
    folder: Path, work: Path, bucket: int, units: Iterable[Taken], filters: Filters, files: list[str]
) -> dict[str, Any]:
    """Write the lists of a bucket (0 where there are none).

    Args:
        files: source and name of each file, as in `Document.source`.
    Returns:
        The manifest's `removed`.
    """
    rules = filters.rules
    samples: dict[str, list] = {}
    found: dict[int, list[dict[str, Any]]] = {}
    temporary = folder / f"{REMOVED}.tmp"
    with open(temporary, "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for number, unit in enumerate(units):
            rows = read_rows(work, unit.key).slice(0, unit.num_rows)
            status, sources = to_numpy(rows["status"]), to_numpy(rows["file"])
            records = to_numpy(rows["record"]) + np.uint64(unit.first_record)
            here = np.flatnonzero((status >= FIRST_RULE) & (to_numpy(rows["bucket"]) == bucket))
            if len(here):
                num_bytes = to_numpy(rows["bytes_before"])
                columns = (sources, records, status - np.uint8(FIRST_RULE), num_bytes)
                arrays = [from_numpy(column[here]) for column in columns]
                writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
            kept = json.loads(run_path(work, unit.key, "samples").read_text(encoding="utf-8"))
            for each in kept["samples"]:
                if each["row"] < unit.num_rows and each.pop("bucket") == bucket:
                    row = each.pop("row")
                    where = {"source": files[sources[row]], "record": int(records[row])}
                    order = (each.pop("hash"), number, row)
                    samples.setdefault(each["rule"], []).append((order, {**where, **each}))
            for each in kept["ngrams"]:
                row = each["row"]
                if row < unit.num_rows and each["bucket"] == bucket:
                    where = {"source": files[sources[row]], "record": int(records[row])}
                    for ngram in each["ngrams"]:
                        found.setdefault(ngram, []).append({**where, "removed": bool(status[row] >= FIRST_RULE)})
            samples = {rule: heapq.nsmallest(NUM_SAMPLES, each) for rule, each in samples.items()}
    temporary.replace(folder / REMOVED)
    _write_lines(folder / SAMPLES, [sample for rule in sorted(samples) for _, sample in samples[rule]])
    names = [REMOVED, SAMPLES]
    if "decontaminate" in filters.options:
        _write_lines(folder / CONTAMINATED, list(mark_items(filters, found)))
        names.append(CONTAMINATED)
    return {
        "rules": rules,
        "versions": library_versions(filters),
        "sha256": {name: sha256_of(folder / name) for name in names},
    }


def check_removed(folder: Path, manifest: Manifest) -> list[str]:
    """Count the documents that were left out again, by source and rule."""
    if manifest.removed is None:
        return []
    problems = []
    for name, sha256 in manifest.removed["sha256"].items():
        path = folder / name
        if not path.exists():
            problems.append(f"{path}: is missing")
        elif sha256_of(path) != sha256:
            problems.append(f"{path}: its content changed (sha256 differs from the manifest)")
    if problems:
        return problems
    table = _read_table(folder)
    files = [json.loads(line)["source"] for line in files_path(folder).read_text(encoding="utf-8").splitlines()]
    pairs, nums = np.unique(np.stack([to_numpy(table["source"]), to_numpy(table["rule"])]), axis=1, return_counts=True)
    counted: Counter = Counter()
    for source, rule, num in zip(*pairs.tolist(), nums.tolist(), strict=True):
        counted[files[source], manifest.removed["rules"][rule]] += num
    expected = {
        (source, rule): num
        for source, entry in manifest.ledger.items()
        for rule, num in entry["documents"]["filtered"].items()
        if rule_filter(rule) in entry.get("filters", {})
    }
    for source, rule in sorted({*counted, *expected}):
        now, then = counted[source, rule], expected.get((source, rule), 0)
        if now != then:
            problems.append(f"{folder / REMOVED}: has {now:,} of {source} by {rule!r} but the ledger says {then:,}")
    return problems


def describe_filters(ledger: dict[str, dict[str, Any]]) -> str:
    """Documents and text in front of and behind every filter, all sources together, as a table, and why."""
    head = ("filter", "documents", "left out", "changed", "documents after", "text", "text after")
    lines, reasons = [head], Counter()
    for entry in ledger.values():
        reasons.update(entry["documents"]["filtered"])
    names = list(dict.fromkeys(name for entry in ledger.values() for name in entry.get("filters", {})))
    for name in names:
        flow: Counter = Counter()
        for entry in ledger.values():
            flow.update(entry.get("filters", {}).get(name, {}))
        numbers = (flow["documents_before"], flow["documents_before"] - flow["documents_after"])
        counts = [f"{each:,}" for each in (*numbers, flow["documents_changed"], flow["documents_after"])]
        lines.append((name, *counts, format_bytes(flow["bytes_before"]), format_bytes(flow["bytes_after"])))
    rows = format_table(lines)
    for name in names:
        why = [f"{rule.partition(': ')[2]} {num:,}" for rule, num in reasons.items() if rule.startswith(f"{name}: ")]
        rows += [f"{name}: {', '.join(why)}"] if why else []
    return "\n".join(rows)


def describe_left_out(all_counts: Iterable[Counts]) -> str:
    """What the filters left out of a dataset, where they may be why nothing is left; empty without filters."""
    total = Counts()
    for counts in all_counts:
        total.add(counts)
    rules = {rule: num for rule, num in total.num_filtered.items() if rule_filter(rule) in total.filters}
    if not rules:
        return ""
    num_documents = next(iter(total.filters.values()))["documents_before"]
    why = ", ".join(f"{rule} {num:,}" for rule, num in sorted(rules.items(), key=lambda item: -item[1]))
    return f" The filters left out {sum(rules.values()):,} of {num_documents:,} documents: {why}."


def iter_removed(folder: Path) -> Iterator[str]:
    """Lines: the table of the filters, then samples of what each rule left out and each filter changed.

    Raises:
        UserError: it was prepared without filters.
    """
    manifest = load_manifest(folder)
    if manifest.removed is None:
        raise UserError(f"{folder}: was prepared without filters, so nothing was left out. See docs/corpus.md.")
    yield describe_filters(manifest.ledger)
    rule = None
    for sample in _read_lines(folder / SAMPLES):
        if sample["rule"] != rule:
            rule = sample["rule"]
            yield f"\n=== {rule}"
        yield f"--- {sample['source']}, record {sample['record']}"
        if "text" in sample:
            yield sample["text"]
        else:
            yield from (f"- {line}" for line in sample["before"].split("\n"))
            yield from (f"+ {line}" for line in sample["after"].split("\n"))
    if CONTAMINATED in manifest.removed["sha256"]:
        items = _read_lines(folder / CONTAMINATED)
        yield f"\n=== evaluation items of which an n-gram is in the corpus: {len(items):,} ({folder / CONTAMINATED})"
        for item in items[:NUM_SAMPLES]:
            yield f"--- {item['file']}, line {item['line']}: {item['num_documents']:,} documents; {item['ngram']}"


def read_samples(folder: Path, most: int) -> dict[str, list[tuple[str, str]]]:
    """By rule, at most so many samples: where from, and the text; of a change the lines around it, with - and +."""
    found: dict[str, list[tuple[str, str]]] = {}
    for sample in _read_lines(folder / SAMPLES) if load_manifest(folder).removed is not None else ():
        here = found.setdefault(sample["rule"], [])
        if len(here) < most:
            where = f"{sample['source']}, record {sample['record']}"
            here.append((where, sample["text"] if "text" in sample else _changed_lines(sample)))
    return found


def _changed_lines(sample: dict[str, Any]) -> str:
    before, after = (sample[key].split("\n") for key in ("before", "after"))
    # both were cut off somewhere: what differs behind the last line in common may be that alone
    *_, last, _ = [(0, 0, 0), *difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()]
    if last[0] + last[2] > 0 and before[: last[0] + last[2]] != after[: last[1] + last[2]]:
        before, after = before[: last[0] + last[2]], after[: last[1] + last[2]]
    lines = difflib.unified_diff(before, after, lineterm="", n=2)
    return "\n".join(line for line in list(lines)[2:] if not line.startswith("@@"))


def _read_table(folder: Path) -> pa.Table:
    with pa.OSFile(str(folder / REMOVED)) as file:
        return pa.ipc.open_stream(file).read_all()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is missing or damaged: {error}. {check_command(path.parent.parent)} names all that is."
        ) from error


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
