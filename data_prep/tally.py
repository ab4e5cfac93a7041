"""One pass over a prepared dataset: everything that `stat` shows, counted.

In: a prepared dataset. Out: a `Tally`. Shards and document maps are memory-mapped and read once, in order, a few
million tokens at a time; memory does not grow with the dataset (data_prep/lengths.py, data_prep/repeats.py).
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.arrays import to_numpy
from data_prep.blocks import Blocks
from data_prep.documents import DocumentMap
from data_prep.lengths import Lengths
from data_prep.manifest import Manifest, load_manifest
from data_prep.parts import iter_tokens
from data_prep.progress import Progress
from data_prep.repeats import RepeatFinder, Repeats, hash_documents

_AT_ONCE = 1 << 22  # tokens of documents that are looked at together
NUM_MOST_REPEATED = 5


@dataclass
class SplitTally:
    """One split. What no block holds, at its end, is in the lengths and in nothing else."""

    tokens: Lengths = field(default_factory=Lengths)  # of documents, separators included
    num_bytes: Lengths = field(default_factory=Lengths)  # of documents' text in the source
    num_cut: int = 0  # documents that a border of blocks cuts
    num_long: int = 0  # documents longer than a block, which are among them
    repeats: Repeats | None = None


@dataclass
class SourceTally:
    """What one source gives to both splits."""

    name: str
    tokens: Lengths = field(default_factory=Lengths)
    num_bytes: int = 0

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text by tokens, separators included; 0 without tokens."""
        return self.num_bytes / self.tokens.total if self.tokens.total else 0.0


@dataclass
class Tally:
    """All that was counted."""

    folder: Path
    manifest: Manifest
    splits: dict[str, SplitTally]
    sources: list[SourceTally]
    counts: np.ndarray  # how often each id stands in the train blocks: int64 (vocab_size,)
    validation_counts: np.ndarray  # likewise in the validation blocks
    num_shared: int  # validation texts that train has too, of the kept ones
    shared_one_in: int

    @property
    def entropy(self) -> float:
        """Unigram entropy of the train tokens in nats: the loss of a model that knows nothing but frequencies."""
        return unigram_entropy(self.counts)

    @property
    def validation_cross_entropy(self) -> float | None:
        """The validation loss in nats of a model that knows nothing but train's frequencies; None without validation.

        Each id counts once more than it stands there (Laplace), so that none is impossible.
        """
        num_tokens = int(self.validation_counts.sum())
        log_p = np.log((self.counts + 1) / (self.counts + 1).sum())
        return float(-(self.validation_counts * log_p).sum() / num_tokens) if num_tokens else None


def tally_dataset(folder: Path) -> Tally:
    """Count everything, with a progress bar.

    Raises:
        UserError: no such dataset, or a damaged file.
    """
    manifest = load_manifest(folder)
    maps = {split: DocumentMap(folder, split) for split in manifest.splits}
    files = next(iter(maps.values())).files
    names = list(dict.fromkeys(file["source"] for file in files))
    sources = [SourceTally(name) for name in names]
    source_of_file = np.array([names.index(file["source"]) for file in files], dtype=np.int64)
    counts = {split: np.zeros(manifest.tokenizer.vocab_size, dtype=np.int64) for split in maps}
    splits, finders = {}, {}
    with Progress("counting", sum(split.num_tokens for split in manifest.splits.values()), "tokens") as progress:
        for split, documents in maps.items():
            finders[split] = RepeatFinder()
            splits[split] = _tally_split(documents, source_of_file, sources, counts[split], finders[split], progress)
    one_in = max(finder.one_in for finder in finders.values())
    others = finders["validation"].hashes(one_in)
    num_shared = int(np.isin(others, finders["train"].hashes(one_in)).sum()) if len(others) else 0
    for split, finder in finders.items():
        splits[split].repeats = finder.find(NUM_MOST_REPEATED)
    return Tally(folder, manifest, splits, sources, counts["train"], counts["validation"], num_shared, one_in)


def unigram_entropy(counts: np.ndarray) -> float:
    """-sum p ln p in nats, p being the tokens' frequencies; 0 without tokens."""
    if not counts.sum():
        return 0.0
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _tally_split(
    documents: DocumentMap,
    source_of_file: np.ndarray,
    sources: list[SourceTally],
    counts: np.ndarray,
    finder: RepeatFinder,
    progress: Progress,
) -> SplitTally:
    blocks = Blocks(documents.folder, documents.split)
    out = SplitTally()
    end_of_blocks = documents.num_tokens if blocks.is_padded else blocks.num_tokens  # in the stream
    batches = [
        batch for batch in documents.table.select(["first_token", "source", "num_bytes"]).to_batches() if len(batch)
    ]
    number = 0
    for i, batch in enumerate(batches):
        columns = (to_numpy(batch[name]) for name in ("first_token", "source", "num_bytes"))
        first, file, num_bytes = (column.astype(np.int64) for column in columns)
        following = batches[i + 1]["first_token"][0].as_py() if i + 1 < len(batches) else documents.num_tokens
        end = np.append(first[1:], following)
        num_tokens = end - first
        out.tokens.add(num_tokens)
        out.num_bytes.add(num_bytes)
        source = source_of_file[file]
        for index in np.unique(source).tolist():
            sources[index].tokens.add(num_tokens[source == index])
            sources[index].num_bytes += int(num_bytes[source == index].sum())
        is_long = num_tokens > blocks.block_size
        is_cut = is_long if blocks.is_padded else first // blocks.block_size != (end - 1) // blocks.block_size
        out.num_cut += int((is_cut & (first < end_of_blocks)).sum())
        out.num_long += int((is_long & (first < end_of_blocks)).sum())
        at = 0
        while at < len(first):
            stop = max(at + 1, int(np.searchsorted(end, first[at] + _AT_ONCE, side="right")))
            if not blocks.is_padded:
                for tokens in iter_tokens(blocks, int(first[at]), min(int(end[stop - 1]), end_of_blocks)):
                    counts += np.bincount(tokens, minlength=len(counts))
            inside = at + int(np.searchsorted(end[at:stop], end_of_blocks, side="right"))
            hashes = hash_documents(blocks, documents, first[at:inside], end[at:inside])
            finder.add(hashes, np.arange(number + at, number + inside), num_tokens[at:inside])
            progress.add_text(int(num_bytes[at:stop].sum()), int(num_tokens[at:stop].sum()))
            progress.add_input(int(num_tokens[at:stop].sum()))
            at = stop
            if not blocks.is_padded:
                blocks.close_before(int(end[at - 1]))
        number += len(first)
    if blocks.is_padded:  # where documents do not lie in their order
        for tokens in iter_tokens(blocks, 0, blocks.num_tokens):
            counts += np.bincount(tokens, minlength=len(counts))
        counts[blocks.fill_token_id] -= blocks.manifest.splits[documents.split].num_padding_tokens
    return out
