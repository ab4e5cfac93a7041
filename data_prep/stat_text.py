"""What was counted in a prepared dataset, in words: for the terminal, and as sentences for the page.

In: a `Tally`. Out: text. The ledger is read as it is: what it counts by a name that is new shows up by that name.
"""

from dataclasses import replace
from typing import Any

from data_prep.ledger import describe_packing
from data_prep.manifest import SPLITS
from data_prep.sizes import format_count
from data_prep.tally import SplitTally, Tally

_KNOWN = ("documents", *SPLITS, "files")  # of an entry: what is shown in its own place
_NO_FATE = ("read", "beyond_cap")  # of an entry's documents: what became of none of those that were read


def describe_tally(tally: Tally) -> str:
    """The numbers as a short table."""
    manifest = tally.manifest
    lines = [
        f"{tally.folder}: vocabulary {manifest.tokenizer.vocab_size:,}, {manifest.dtype}, blocks of "
        f"{manifest.block_size:,} tokens ({manifest.packing}), licence {manifest.licence}"
    ]
    for name, split in manifest.splits.items():
        lines.append(
            f"{name}: {split.num_documents:,} documents, {split.num_bytes:,} bytes, {split.num_tokens:,} "
            f"tokens, {split.num_blocks:,} blocks"
        )
        if split.num_documents:
            lines.append(
                f"  {split.num_bytes / split.num_tokens:.3f} bytes per token; {describe_lengths(tally.splits[name])}"
            )
            counted = replace(split, num_cut=tally.splits[name].num_cut, num_long=tally.splits[name].num_long)
            lines += [f"  {sentence}" for sentence in describe_packing(counted, manifest.block_size)]
            lines.append(f"  {describe_repeats(tally.splits[name])}")
    shared = describe_shared(tally)
    lines += [f"  {shared}"] if shared else []
    fates = fates_of_documents(manifest.ledger)
    num_read = sum(entry["documents"]["read"] for entry in manifest.ledger.values())
    lost = [f"{name} {num:,} ({share(num, num_read)})" for name, num in fates.items() if name not in SPLITS and num]
    lines.append(f"left out of {num_read:,} documents read: {', '.join(lost) or 'none'}")
    lines.append(f"unigram entropy of train: {tally.entropy:.4f} nats per token")
    if tally.validation_cross_entropy is not None:
        lines.append(f"  train's frequencies on validation: {tally.validation_cross_entropy:.4f} nats per token")
    num_unused = int((tally.counts == 0).sum())
    lines.append(f"entries of the vocabulary that train never uses: {num_unused:,} of {len(tally.counts):,}")
    return "\n".join(lines)


def describe_lengths(split: SplitTally) -> str:
    """The lengths of a split's documents in one sentence."""
    tokens = split.tokens
    return (
        f"{tokens.mean:,.1f} tokens per document, half have at most {tokens.quantile(0.5):,}, 99 % at most "
        f"{tokens.quantile(0.99):,}, the longest {tokens.largest:,}"
    )


def describe_repeats(split: SplitTally) -> str:
    """How much of a split stands in it more than once."""
    repeats = split.repeats
    of_documents = share(repeats.num_copies, repeats.num_documents)
    of_tokens = share(repeats.num_copied_tokens, repeats.num_tokens)
    sampled = f", counted in one text of {repeats.one_in}, chosen by hash" if repeats.one_in > 1 else ""
    copies = f"exact copies of an earlier document: {repeats.num_copies:,}"
    return f"{copies} ({of_documents}, {of_tokens} of the tokens){sampled}"


def describe_shared(tally: Tally) -> str:
    """Texts that validation has and train too; empty where there is none."""
    if not tally.num_shared:
        return ""
    sampled = f", counted in one text of {tally.shared_one_in}, chosen by hash" if tally.shared_one_in > 1 else ""
    return f"validation texts that train has too: {tally.num_shared:,}{sampled}"


def fates_of_documents(ledger: dict[str, dict[str, Any]]) -> dict[str, int]:
    """What became of the documents that were read, of all sources: train, validation, then each way of being left out.

    A rule of a filter has its own name; what is counted in several ways is taken by documents.
    """
    fates: dict[str, int] = dict.fromkeys(SPLITS, 0)
    for entry in ledger.values():
        for name, value in entry["documents"].items():
            if name in _NO_FATE or name.startswith("is_"):
                continue
            for key, num in (value if isinstance(value, dict) else {name: value}).items():
                if isinstance(num, dict):
                    num = num.get("num_documents", 0)
                fates[key] = fates.get(key, 0) + int(num)
    return fates


def more_of_ledger(ledger: dict[str, dict[str, Any]]) -> tuple[list[str], dict[str, list[tuple[str, ...]]]]:
    """What else the ledger says of the sources, by the names that it uses.

    Returns:
        Sentences; and tables by title, whose first row is the head.
    """
    sentences, tables = [], {}
    for source, entry in ledger.items():
        for key, value in entry.items():
            if key in _KNOWN or not value:
                continue
            if not isinstance(value, dict):
                sentences.append(f"{source}: {key}: {value}")
                continue
            for name, numbers in value.items():
                head = ("source", "", *(field.replace("_", " ") for field in numbers))
                row = (source, name, *(f"{number:,}" for number in numbers.values()))
                tables.setdefault(key, [head]).append(row)
    return sentences, tables


def share(part: int, whole: int) -> str:
    """`2.35 %`: three digits; 0 % is nothing and 100 % everything."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    if 0 < percent < 0.01:
        return "under 0.01 %"
    return "over 99.9 %" if 99.95 <= percent < 100 else f"{percent:.3g} %"


def short(num: float) -> str:
    """A count in three digits."""
    return format_count(round(num)).replace(" ", "\u202f")
