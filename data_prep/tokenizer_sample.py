"""What a tokenizer is trained on: a sample of the train documents of all sources.

In: the stream, and how many bytes of text it may be. Out: texts, or a tokenizer. What does not fit the budget is
drawn: a source's units (row groups, byte ranges, groups of small files) in the order of a keyed hash of their names,
so that all parts of a corpus can be in the sample, whatever order its files are in. No more is read than is used, but
for held-out documents.
"""

import hashlib
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from data_prep.encode import text_hash
from data_prep.filters import iter_clean
from data_prep.memory import available_memory
from data_prep.progress import Progress
from data_prep.readers import Record, read_records
from data_prep.sizes import format_bytes
from data_prep.stream import Stream
from data_prep.tokenizer_training import ControlTokens, train_tokenizer
from data_prep.units import UNIT_BYTES, Unit

DEFAULT_SAMPLE_BYTES = 2_000_000_000
KEY = b"sample of a tokenizer"
WORD = re.compile(r" ?[^\W\d_]+| ?\d+| ?[^\s\w]+|\s+")  # about GPT-2's words, by what Python's re knows


def train_on_sample(
    stream: Stream, threshold: int, sample_bytes: int, vocab_size: int, folder: Path, control: ControlTokens
) -> None:
    """Draw the sample and train on it, with a progress bar of the reading; training shows its own.

    Raises:
        UserError: as `train_tokenizer`.
    """
    size = min(sum(file.size for _, file in stream.files), sample_bytes)
    with Progress("reading for the tokenizer", size) as progress:

        def texts() -> Iterator[str]:
            yield from iter_sample(stream, threshold, sample_bytes, progress)
            progress.finish()
            progress.close()
            text = format_bytes(progress.num_text_bytes)
            print(f"training a tokenizer of {vocab_size:,} entries on {text} of text ...", file=sys.stderr)

        train_tokenizer(texts(), vocab_size, folder, control)


def iter_sample(stream: Stream, threshold: int, sample_bytes: int, progress: Progress) -> Iterator[str]:
    """Train documents of all sources within the byte budget, which the sources share by size; validation is never seen.

    Of a source with a cap on its documents, the first ones, since the others are not in the dataset.
    """
    sizes = [
        sum(file.size for source, file in stream.files if source == number) for number in range(len(stream.sources))
    ]
    memory = _MemoryEstimate(min(sample_bytes, sum(sizes)))
    num_documents_left = stream.max_docs if stream.max_docs is not None else math.inf
    for number, source in enumerate(stream.sources):
        budget = sample_bytes * sizes[number] // max(sum(sizes), 1)
        cap = min(source.max_documents or math.inf, num_documents_left)
        records = _capped(stream, number, cap) if cap < math.inf else _drawn(stream, number, budget)
        for num_bytes_before, record in records:
            if budget <= num_bytes_before:
                break
            num_documents_left -= 1
            data = record.text.encode()
            if not source.has_official_validation and text_hash(data) < threshold:
                continue
            progress.add_text(len(data), 0)
            progress.add_input(len(data))
            memory.see(record.text, len(data))
            yield record.text


def _capped(stream: Stream, number: int, cap: float) -> Iterator[tuple[int, Record]]:
    """The first `cap` documents of a source, each with the bytes in front of it."""
    num_bytes = num_documents = 0
    for unit in stream.train_units(number):
        for record in _documents(stream, unit):
            if num_documents == cap:
                return
            yield num_bytes, record
            num_documents, num_bytes = num_documents + 1, num_bytes + len(record.text.encode())


def _drawn(stream: Stream, number: int, budget: int) -> Iterator[tuple[int, Record]]:
    """Documents of drawn units, each with the bytes in front of it."""
    units = sorted(stream.sample_units(number, budget, _draw), key=lambda unit: _sort_key(stream, unit))
    num_bytes = 0
    for position, unit in enumerate(units):
        # A compressed file is one unit, however large: it gives its part, and the others theirs.
        end = num_bytes + max(UNIT_BYTES, (budget - num_bytes) // (len(units) - position))
        for record in _documents(stream, unit):
            if num_bytes >= end:
                break
            yield num_bytes, record
            num_bytes += len(record.text.encode())


def _documents(stream: Stream, unit: Unit) -> Iterator[Record]:
    stream.downloads.fetch_unit(unit.pieces)
    records = read_records(unit.pieces, stream.reading(unit.source))
    texts = (record for record in records if record.text and record.problem is None)
    yield from texts if stream.filters is None else iter_clean(texts, unit.pieces, stream.filters)
    stream.downloads.forget_parts(unit.pieces)


def _sort_key(stream: Stream, unit: Unit) -> tuple[int, int]:
    piece = unit.pieces[0]
    is_large = unit.num_bytes > 2 * UNIT_BYTES
    return (unit.num_bytes if is_large else 0, _draw(f"{stream.files[piece.file][1].name}:{piece.start}"))


def _draw(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, key=KEY).digest(), "big")


class _MemoryEstimate:
    """The memory that training will take, said as soon as the beginning of the sample shows how many words there are.

    HF's trainer holds each different word once, with its symbols and with where each pair of symbols stands: measured
    on 30, 100 and 400 MB of text, 330 MB and 75 bytes for each byte of different words (docs/prepare.md). Their number
    grows more slowly than the text, so that in proportion to it is a bound.
    """

    BASE_BYTES = 350_000_000
    BYTES_PER_WORD_BYTE = 75
    LOOKED_AT_BYTES = 16_000_000

    def __init__(self, sample_bytes: int):
        self.sample_bytes, self.num_bytes = sample_bytes, 0
        self.words: set[str] = set()
        self.is_said = sample_bytes <= self.LOOKED_AT_BYTES

    def see(self, text: str, num_bytes: int) -> None:
        """Note the words of a text of the sample."""
        if self.is_said:
            return
        self.num_bytes += num_bytes
        self.words.update(WORD.findall(text))
        if self.num_bytes >= self.LOOKED_AT_BYTES:
            self.is_said = True
            self._say(sum(len(word.encode()) for word in self.words))
            self.words = set()

    def _say(self, num_word_bytes: int) -> None:
        share = self.sample_bytes / self.num_bytes
        need = int(self.BASE_BYTES + self.BYTES_PER_WORD_BYTE * num_word_bytes * share)
        room = available_memory()
        print(f"training the tokenizer takes at most about {format_bytes(need)} of memory", file=sys.stderr)
        if room is not None and need > room:
            print(
                f"warning: {format_bytes(room)} are free. Should it be killed, train it on less: python -m data_prep "
                f"train-tokenizer ... --sample-bytes {format_bytes(self.sample_bytes // 4).replace(' ', '')}",
                file=sys.stderr,
            )
