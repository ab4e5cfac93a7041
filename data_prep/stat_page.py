"""What was counted in a prepared dataset as one HTML file that needs nothing else, with pictures.

In: a `Tally`. Out: a page (data_prep/stat.html is its template): no script, no network. Text of the corpus is never
markup, since jinja2 escapes all that the template shows but the pictures, which are made here of numbers.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.charts import Tick, draw_bars, draw_curve
from data_prep.dataset_text import DatasetText
from data_prep.lengths import Lengths
from data_prep.packing import CONCAT
from data_prep.sizes import format_bytes
from data_prep.stat_text import (
    describe_repeats,
    describe_shared,
    fates_of_documents,
    more_of_ledger,
    share,
    short,
)
from data_prep.tally import Tally

NUM_IDS = 50  # in each list
NUM_SAMPLES = 6
_NUM_REMOVED = 3  # samples of each rule
_SAMPLE_TOKENS = 300
_MOST_TOKEN_BYTES = 20  # the last bar holds all that are longer


def write_page(tally: Tally, path: Path) -> None:
    """Write the page, by rename: a browser never sees half of it.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(render(tally), encoding="utf-8")
    os.replace(temporary, path)


def render(tally: Tally) -> str:
    """The page."""
    from jinja2 import Environment

    text = DatasetText(tally.folder, "train")
    template = Path(__file__).with_name("stat.html").read_text(encoding="utf-8")
    shown = {**_documents(tally), **_fates(tally), **_borders(tally, text), **_sources(tally), **_tokens(tally, text)}
    return (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(template)
        .render(
            title=tally.manifest.dataset,
            facts=_facts(tally),
            samples=_samples(tally, text),
            notes=text.notes,
            removed=_removed(tally),
            **shown,
        )
    )


def _facts(tally: Tally) -> list[tuple[str, str]]:
    manifest = tally.manifest
    facts = [("folder", str(tally.folder))]
    for name, split in manifest.splits.items():
        facts.append(
            (name, f"{split.num_documents:,} documents, {format_bytes(split.num_bytes)} of text, {split.num_tokens:,} "
                   f"tokens, {split.num_blocks:,} blocks of {manifest.block_size:,}")
        )  # fmt: skip
    train = manifest.splits["train"]
    nats, per_token = tally.entropy, train.num_bytes / train.num_tokens if train.num_tokens else 0.0
    bits = f", {nats / math.log(2) / per_token:.3f} bits per byte" if per_token else ""
    facts.append(("unigram entropy", f"{nats:.4f} nats per token{bits}: the loss of knowing frequencies alone"))
    if tally.validation_cross_entropy is not None:
        nats = f"{tally.validation_cross_entropy:.4f} nats per token"
        facts.append(("train's frequencies on validation", f"{nats}: the validation loss of knowing them alone"))
    facts.append(("vocabulary", f"{manifest.tokenizer.vocab_size:,} ids as {manifest.dtype}"))
    facts.append(("packing", manifest.packing))
    facts.append(("encoder", str(manifest.encoder.get("name", "-"))))
    facts.append(("licence", str(manifest.licence)))
    facts.append(("fingerprint", manifest.fingerprint[:16]))
    return facts


def _documents(tally: Tally) -> dict[str, Any]:
    from markupsafe import Markup

    figures, rows = [], []
    for name, split in tally.splits.items():
        if not split.tokens.num:
            continue
        title = f"{name}: {split.tokens.num:,} documents"
        figures.append((title, Markup(_draw_lengths(split.tokens, name))))
        rows.append((f"{name}, tokens", f"{split.tokens.num:,}", *_quantiles(split.tokens)))
        rows.append((f"{name}, bytes of text", f"{split.num_bytes.num:,}", *_quantiles(split.num_bytes)))
    return {"documents": figures, "lengths": rows}


def _quantiles(lengths: Lengths) -> list[str]:
    values = [lengths.mean, *(lengths.quantile(q) for q in (0.1, 0.5, 0.9, 0.99)), lengths.largest]
    return [f"{round(value):,}" for value in values]


def _draw_lengths(lengths: Lengths, name: str) -> str:
    bins = lengths.coarse(4 if lengths.quantile(0.5) >= 32 else 2)
    bars = [
        (num / lengths.num, f"{first:,.0f} to {end:,.0f} tokens: {num:,} documents, {total:,} tokens")
        for first, end, num, total in bins
    ]
    line = [total / max(lengths.total, 1) for _, _, _, total in bins]
    low, high = math.log10(bins[0][0]), math.log10(bins[-1][1])
    return draw_bars(bars, line, _decades(low, high), f"how many documents of {name} have how many tokens")


def _decades(low: float, high: float) -> list[Tick]:
    """Ticks at powers of ten of a logarithmic axis from 10**low to 10**high; at powers of two where it is short."""
    base = math.log10(10 if high - low >= 2 else 2)
    powers = range(math.ceil(low / base - 1e-9), math.floor(high / base + 1e-9) + 1)
    return [((n * base - low) / max(high - low, 1e-9), short(10 ** (n * base))) for n in powers]


def _fates(tally: Tally) -> dict[str, Any]:
    ledger = tally.manifest.ledger
    num_read = sum(entry["documents"]["read"] for entry in ledger.values())
    rows = [
        (name, num / max(num_read, 1), f"{num:,} ({share(num, num_read)})")
        for name, num in fates_of_documents(ledger).items()
    ]
    notes = []
    for source, entry in ledger.items():
        beyond, is_exact = entry["documents"]["beyond_cap"], entry["documents"]["is_beyond_cap_exact"]
        if beyond or not is_exact:
            notes.append(
                f"{source}: {'' if is_exact else 'at least '}{beyond:,} documents beyond the cap were not read."
            )
    sentences, tables = more_of_ledger(ledger)
    return {"num_read": f"{num_read:,}", "fates": rows, "fate_notes": notes + sentences, "ledger_tables": tables}


def _removed(tally: Tally) -> dict[str, list[tuple[str, str]]]:
    """By rule, samples of what filters left out or changed; empty without filters."""
    if tally.manifest.removed is None:
        return {}
    from data_prep.removed import read_samples

    return read_samples(tally.folder, _NUM_REMOVED)


def _borders(tally: Tally, text: DatasetText) -> dict[str, Any]:
    rows, notes = [], []
    for name, split in tally.splits.items():
        num, repeats = split.tokens.num, split.repeats
        if not num:
            continue
        rows.append(
            (f"{name}: cut by a block border", split.num_cut / num, f"{split.num_cut:,} ({share(split.num_cut, num)})")
        )
        rows.append(
            (f"{name}: longer than a block", split.num_long / num, f"{split.num_long:,} ({share(split.num_long, num)})")
        )
        copies = f"{repeats.num_copies:,} ({share(repeats.num_copies, repeats.num_documents)})"
        rows.append((f"{name}: exact copies", repeats.copies_fraction, copies))
        info = tally.manifest.splits[name]
        if tally.manifest.packing != CONCAT:
            num_padding, num_positions = info.num_padding_tokens, info.num_blocks * tally.manifest.block_size
            wasted = f"{num_padding:,} ({share(num_padding, num_positions)})"
            rows.append((f"{name}: padding", num_padding / max(num_positions, 1), wasted))
        if repeats.num_copies or repeats.one_in > 1:
            notes.append(f"{name}: {describe_repeats(split)}.")
    shared = describe_shared(tally)
    notes += [f"{shared}."] if shared else []
    notes.append("A copy is a document whose tokens are those of an earlier one, by 64 bits of a hash.")
    repeated = []
    for how_often, number in tally.splits["train"].repeats.most:
        document = text.documents.document(number)
        where = f"{how_often:,} times in train, first in {text.describe(document)}"
        repeated.append((where, _begin(text, document.first_token, document.end_token)))
    return {"borders": rows, "repeat_notes": notes, "repeated": repeated}


def _sources(tally: Tally) -> dict[str, Any]:
    rows = [
        (
            source.name,
            f"{source.tokens.num:,}",
            f"{source.tokens.total:,}",
            format_bytes(source.num_bytes),
            f"{source.bytes_per_token:.3f}",
            *(f"{source.tokens.quantile(q):,}" for q in (0.1, 0.5, 0.9)),
        )
        for source in tally.sources
    ]
    most = max((source.bytes_per_token for source in tally.sources), default=0) or 1.0
    meters = [(s.name, s.bytes_per_token / most, f"{s.bytes_per_token:.3f}") for s in tally.sources]
    return {"sources": rows, "bytes_per_token": meters}


def _tokens(tally: Tally, text: DatasetText) -> dict[str, Any]:
    from markupsafe import Markup

    counts, total = tally.counts, max(int(tally.counts.sum()), 1)
    order = np.argsort(-counts, kind="stable")
    num_used = int(np.count_nonzero(counts))
    covered = np.cumsum(counts[order]) / total
    ranks = np.unique(np.geomspace(1, max(num_used, 1), 120).round().astype(int))
    width = math.log10(max(num_used, 2))
    ticks = _decades(0, width)
    coverage = [(math.log10(rank) / width, float(covered[rank - 1])) for rank in ranks]
    height = math.log10(max(int(counts.max(initial=0)), 2))
    frequency = [(math.log10(n) / width, math.log10(max(int(counts[order[n - 1]]), 1)) / height) for n in ranks]
    needed = [f"{int(np.searchsorted(covered, part)) + 1:,} ids cover {100 * part:g} %" for part in (0.5, 0.9, 0.99)]
    unused = np.flatnonzero(counts == 0)

    def rows(ids: np.ndarray) -> list[tuple[str, str, str, str]]:
        return [
            (text.show_token(id_), f"{id_}", f"{counts[id_]:,}", share(int(counts[id_]), total)) for id_ in ids.tolist()
        ]

    title = f"{len(unused):,} of {len(counts):,} ids are never used; the first {min(NUM_IDS, len(unused))}"
    return {
        "token_lengths": Markup(_draw_token_lengths(tally, text)) if text.vocabulary else None,
        "coverage": Markup(draw_curve(coverage, ticks, [(n / 4, f"{25 * n} %") for n in range(5)], "coverage")),
        "coverage_note": f"{'; '.join(needed)}.",
        "frequency": Markup(draw_curve(frequency, ticks, _decades(0, height), "frequency by rank")),
        "most": rows(order[: min(NUM_IDS, num_used)]),
        "least": rows(order[max(num_used - NUM_IDS, 0) : num_used][::-1]),
        "unused": [(text.show_token(id_), f"{id_}") for id_ in unused[:NUM_IDS].tolist()],
        "unused_title": title,
    }


def _draw_token_lengths(tally: Tally, text: DatasetText) -> str:
    lengths = np.minimum(text.vocabulary.lengths, _MOST_TOKEN_BYTES)
    used = np.bincount(lengths, weights=tally.counts, minlength=_MOST_TOKEN_BYTES + 1)
    entries = np.bincount(lengths, minlength=_MOST_TOKEN_BYTES + 1)
    used_total = max(used.sum(), 1)
    names = [f"{n} bytes" if n < _MOST_TOKEN_BYTES else f"{n} bytes or more" for n in range(_MOST_TOKEN_BYTES + 1)]
    bars = [
        (num / used_total, f"{name}: {int(num):,} tokens, {int(entry):,} entries")
        for num, entry, name in zip(used, entries, names, strict=True)
    ]
    num_bars = len(bars)
    ticks = [((n + 0.5) / num_bars, f"{n}" if n < _MOST_TOKEN_BYTES else f"{n}+") for n in range(0, num_bars, 2)]
    return draw_bars(bars, (entries / max(len(lengths), 1)).tolist(), ticks, "how many tokens have how many bytes")


def _samples(tally: Tally, text: DatasetText) -> list[tuple[str, str]]:
    """Documents that the fingerprint chooses: the same ones for the same data."""
    num = len(text.documents)
    rng = np.random.default_rng(int(tally.manifest.fingerprint[:16], 16))
    numbers = sorted(rng.choice(num, min(NUM_SAMPLES, num), replace=False).tolist())
    chosen = [text.documents.document(number) for number in numbers]
    return [(text.describe(each), _begin(text, each.first_token, each.end_token)) for each in chosen]


def _begin(text: DatasetText, first_token: int, end_token: int) -> str:
    num_left = end_token - first_token - _SAMPLE_TOKENS
    if num_left <= 0:
        return text.text(first_token, end_token)
    shown = text.text(first_token, first_token + _SAMPLE_TOKENS)
    return f"{shown}\n[... {num_left:,} more tokens ...]"
