"""`python -m clm explain RUN --grep TEXT` and `--token ID`: at which steps was, or will, this be seen?

In: a run and a text, or a token. Out: each occurrence in the train blocks of the run's datasets, with its document, its
block, and the steps that train on it. Every step is known beforehand, since the order is a function of the recipe.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from clm.explain import RunText, open_text
from clm.run_folder import find_run
from clm.search import Matches, TextPattern, find_token
from data_prep.blocks import Blocks
from data_prep.documents import DocumentMap
from data_prep.errors import UserError
from data_prep.parts import describe_document, find_parts
from data_prep.sizes import format_bytes
from data_prep.vocabulary import on_one_line, show_unseen

_CONTEXT_BYTES = 40  # shown on each side of an occurrence
MAX_KEPT = 2_000  # occurrences whose steps are worked out, at a millisecond each; all are counted
_NEVER = 2**62
_CONTEXT_TOKENS = 40  # read for it: a token gives a byte at least, control tokens apart


@dataclass(frozen=True)
class Occurrence:
    """One occurrence: positions of the tokens with its first and last byte, in the train split of a dataset."""

    dataset: int
    first_token: int
    offset: int  # bytes of the first token that come before it
    last_token: int


@dataclass
class Found:
    """What a search gave: all counts, and the first MAX_KEPT occurrences."""

    occurrences: list[Occurrence]
    num_occurrences: int
    num_blocks: int  # in which one begins
    num_bytes: int  # of text searched
    seconds: float


def search(text: RunText, pattern: TextPattern | int) -> Found:
    """Look for a text, or a token id, in the train blocks of all datasets of a run."""
    from tqdm import tqdm

    splits = text.replay.splits
    total = sum(split.num_tokens for split in splits)
    splits[0].shard_tokens(0)  # what it imports takes longer than a small search
    found, started_s = Found([], 0, 0, 0, 0.0), time.monotonic()
    with tqdm(total=total, desc="searching", unit=" tokens", unit_scale=True, leave=False, disable=None) as bar:
        for dataset, split in enumerate(splits):
            last_block = -1
            for matches in _find(pattern, split, bar.update, text.documents[dataset]):
                blocks = np.unique(matches.first // split.block_size)
                found.num_blocks += len(blocks) - int(last_block in blocks[:1])
                last_block = int(blocks[-1]) if len(blocks) else last_block
                found.num_occurrences += len(matches.first)
                for i in range(min(len(matches.first), MAX_KEPT - len(found.occurrences))):
                    places = (int(each[i]) for each in (matches.first, matches.offset, matches.last))
                    found.occurrences.append(Occurrence(dataset, *places))
            found.num_bytes += _text_bytes(split)
    found.seconds = time.monotonic() - started_s
    return found


def print_search(name: str, grep: str | None, token: str | None, limit: int) -> int:
    """Print what was found, what the run sees first first; the exit code is 1 when nothing was."""
    text = open_text(find_run(name))
    pattern, what = _read_pattern(text, grep, token)
    found = search(text, pattern)
    speed = found.num_bytes / max(found.seconds, 1e-9) / 1e6
    names = ", ".join(text.names)
    searched = f"{format_bytes(found.num_bytes)} of text ({names}; {found.seconds:.2f} s, {speed:,.0f} MB/s)"
    if not found.num_occurrences:
        print(f"{what}: not found in {searched}")
        for note in text.vocabulary.differences if grep is not None else []:
            print(note)
        return 1
    print(f"{what}: {found.num_occurrences:,} times, in {found.num_blocks:,} blocks, in {searched}")
    for note in text.notes:
        print(note)
    first_steps = {block: _first_step(text, *block) for block in {_block(text, each) for each in found.occurrences}}
    in_run = [each for each in found.occurrences if first_steps[_block(text, each)] < _NEVER]
    kept = "" if found.num_occurrences == len(found.occurrences) else f"Of the first {MAX_KEPT:,}, "
    print(f"{kept}{len(in_run):,} are in the {text.replay.timeline.num_steps:,} steps of this run.")
    shown = sorted(found.occurrences, key=lambda each: first_steps[_block(text, each)])[:limit]
    for occurrence in shown:
        print("\n" + "\n".join(describe(text, occurrence)))
    if len(found.occurrences) > len(shown):
        print(f"\n{len(found.occurrences) - len(shown):,} more are not printed: --limit {len(found.occurrences)}")
    return 0


def read_token(text: RunText, wanted: str) -> int:
    """The id that --token means: a number, or the text or name of one token.

    Raises:
        UserError: no such id, or no single token reads so.
    """
    vocabulary = text.vocabulary
    if wanted.isdecimal():
        if int(wanted) < len(vocabulary.table):
            return int(wanted)
        raise UserError(
            f"--token is {wanted} but the vocabulary has the ids 0 to {len(vocabulary.table) - 1:,}. Name one of them."
        )
    if wanted in vocabulary.names:
        return vocabulary.names.index(wanted)
    data = wanted.encode("utf-8", "surrogateescape")
    if data and data in vocabulary.table:
        return vocabulary.table.index(data)
    raise UserError(f"--token is {wanted!r} but no single token reads so. Look for the text with --grep instead.")


def describe(text: RunText, occurrence: Occurrence) -> list[str]:
    """Lines for one occurrence: block, document, the text around it, and the steps that see it."""
    split, documents = text.replay.splits[occurrence.dataset], text.documents[occurrence.dataset]
    name = text.names[occurrence.dataset]
    blocks = list(dict.fromkeys((_positions(split, documents, occurrence, 0)[0] // split.block_size).tolist()))
    at = occurrence.first_token
    lines = [f"{name}:{blocks[0]}, token {at % split.block_size}: {_context(text, split, occurrence)}"]
    if documents is not None:
        part = find_parts(split, documents, text.vocabulary.lengths, at, at + 1)[0]
        lines.append(f"  {describe_document(part.document, f'from byte {part.first_byte + occurrence.offset:,}')}")
    for block in blocks:
        prefix = f"{name}:{block}, where it {'begins' if block == blocks[0] else 'goes on'}: " * (len(blocks) > 1)
        lines += [f"  {prefix}{sentence}" for sentence in text.describe_steps(occurrence.dataset, block)]
    return lines


def _read_pattern(text: RunText, grep: str | None, token: str | None) -> tuple[TextPattern | int, str]:
    """What to look for, and its name."""
    if grep is None:
        id_ = read_token(text, token)
        return id_, f"token {id_} ({show_unseen(text.vocabulary.show(id_))})"
    if not grep:
        raise UserError("--grep is empty, which stands everywhere. Give the text to look for.")
    return TextPattern(grep.encode("utf-8", "surrogateescape"), text.vocabulary.table), show_unseen(repr(grep))


def _block(text: RunText, occurrence: Occurrence) -> tuple[int, int]:
    return occurrence.dataset, occurrence.first_token // text.replay.splits[occurrence.dataset].block_size


def _first_step(text: RunText, dataset: int, block: int) -> int:
    """The first step that sees a block; a great number for none."""
    return min((step for _, step in text.steps_of(dataset, block) if step is not None), default=_NEVER)


def _find(
    pattern: TextPattern | int, split: Blocks, report: object, documents: DocumentMap | None
) -> Iterator[Matches]:
    return find_token(pattern, split, report) if isinstance(pattern, int) else pattern.find(split, report, documents)


def _context(text: RunText, split: Blocks, occurrence: Occurrence) -> str:
    """The text on both sides, on one line."""
    positions, first, end = _positions(split, text.documents[occurrence.dataset], occurrence, _CONTEXT_TOKENS)
    tokens, vocabulary = split.token_at(positions).tolist(), text.vocabulary
    pieces = [str(vocabulary.names[t]).encode() if vocabulary.is_control(t) else vocabulary.table[t] for t in tokens]
    before, inside, after = (b"".join(each) for each in (pieces[:first], pieces[first:end], pieces[end:]))
    shown = before[-_CONTEXT_BYTES:] + inside + after[:_CONTEXT_BYTES]
    return on_one_line(shown.decode(errors="ignore"))


def _positions(
    split: Blocks, documents: DocumentMap | None, occurrence: Occurrence, margin: int
) -> tuple[np.ndarray, int, int]:
    """The positions of an occurrence's tokens, with so many more on both sides; which of them is its first, its end.

    Those on the sides are what was beside it in the corpus, wherever packing put them.
    """
    first, last = occurrence.first_token, occurrence.last_token
    least, most, ranges = 0, split.num_tokens, lambda begin, end: [(begin, end)]
    if split.is_padded and documents is None:  # then it lies in one block
        least = first // split.block_size * split.block_size
        most = least + int(split.lengths_of(np.array(first // split.block_size)))
    elif split.is_padded:
        first, last, most, ranges = *map(documents.place_of, (first, last)), documents.num_tokens, documents.ranges
    begin = max(least, first - margin)
    found = ranges(begin, min(most, last + 1 + margin))
    return np.concatenate([np.arange(*each) for each in found]), first - begin, last + 1 - begin


def _text_bytes(split: Blocks) -> int:
    """Bytes of text in the blocks of a split, by the share of its tokens that they hold."""
    info = split.manifest.splits[split.split]
    return info.num_bytes * min(split.num_tokens, info.num_tokens) // max(1, info.num_tokens)
