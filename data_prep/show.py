"""Looking at a prepared dataset: documents and blocks as text, and its numbers.

In: a prepared dataset. Out: text for people. Documents are decoded from their tokens, so what is shown is what a model
sees.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.blocks import Blocks
from data_prep.catalog import entry_names, load_entry
from data_prep.documents import Document, DocumentMap
from data_prep.ledger import describe_packing
from data_prep.manifest import Manifest, load_manifest
from data_prep.sizes import format_bytes, format_count
from data_prep.tokenizer_folder import load_backend

MAX_SHOWN_TOKENS = 200


def iter_inspection(folder: Path, split: str, num_documents: int, num_blocks: int, first: int) -> Iterator[str]:
    """Lines: some documents from number `first` on, then some blocks with the borders of documents marked."""
    manifest = load_manifest(folder)
    blocks, documents = Blocks(folder, split), DocumentMap(folder, split)
    blocks_text = f"{blocks.num_blocks:,} blocks of {blocks.block_size:,} tokens"
    yield f"{folder}/{split}: {len(documents):,} documents, {blocks_text}"
    for number in range(first, min(first + num_documents, len(documents))):
        document = documents.document(number)
        yield f"\n=== document {number:,}: {describe_document(document)}"
        ranges = documents.ranges(document.first_token, document.end_token)
        num_left = document.end_token - document.first_token - sum(end - first for first, end in ranges)
        yield decode(folder, blocks, ranges) + (
            f"\n[... {num_left:,} tokens lie beyond the last block]" if num_left else ""
        )
    for number in range(min(num_blocks, blocks.num_blocks)):
        start, end = number * blocks.block_size, (number + 1) * blocks.block_size
        yield f"\n=== block {number:,}: tokens {start:,} to {end:,}"
        for piece in documents.pieces(start, end):
            begun = " (begun in an earlier block)" if piece.is_begun else ""
            yield f"--- document {piece.document.number:,}{begun}: {describe_document(piece.document)}"
            yield decode(folder, blocks, [(piece.first_token, piece.end_token)])
            following = "another" if blocks.is_padded else "the next"
            yield f"--- goes on in {following} block" if piece.goes_on else "--- end of document"
        num_padding = blocks.block_size - int(blocks.lengths_of(np.array(number)))
        if num_padding:
            yield f"--- {num_padding:,} of padding"
    if manifest.splits[split].remainder_tokens:
        yield f"\n{manifest.splits[split].remainder_tokens:,} tokens at the end of the split fill no block."


def describe_document(document: Document) -> str:
    """Where a document comes from, and how long it is."""
    kept = "".join(f", {name} {value}" for name, value in document.columns.items() if value is not None)
    num_tokens = document.end_token - document.first_token
    return f"{document.source}, record {document.record}, {document.num_bytes:,} bytes, {num_tokens:,} tokens{kept}"


def decode(folder: Path, blocks: Blocks, ranges: list[tuple[int, int]]) -> str:
    """The tokens at these positions of the blocks as text with control tokens, without a long middle."""
    backend = load_backend(folder / "tokenizer")
    positions = np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(first, end) for first, end in ranges)])
    num_left = len(positions) - 2 * MAX_SHOWN_TOKENS
    shown = [positions] if num_left <= 0 else [positions[:MAX_SHOWN_TOKENS], positions[-MAX_SHOWN_TOKENS:]]
    texts = [backend.decode(blocks.token_at(each).tolist(), skip_special_tokens=False) for each in shown]
    return f"\n[... {num_left:,} tokens not shown ...]\n".join(texts)


def describe_statistics(folder: Path) -> str:
    """Counts by split, and the unigram entropy of the train tokens.

    The loss of a model that knows nothing but frequencies.
    """
    manifest = load_manifest(folder)
    lines = [
        f"{folder}: vocabulary {manifest.tokenizer.vocab_size:,}, {manifest.dtype}, blocks of "
        f"{manifest.block_size:,} tokens ({manifest.packing}), "
        f"licence {manifest.licence}"
    ]
    for name, split in manifest.splits.items():
        lines.append(
            f"{name}: {split.num_documents:,} documents, {split.num_bytes:,} bytes, {split.num_tokens:,} "
            f"tokens, {split.num_blocks:,} blocks"
        )
        if split.num_documents:
            lines.append(
                f"  {split.num_bytes / split.num_tokens:.3f} bytes per token, "
                f"{split.num_tokens / split.num_documents:,.1f} tokens per document"
            )
        lines += [f"  {line}" for line in describe_packing(split, manifest.block_size)]
    counts = count_tokens(folder, manifest)
    lines.append(f"unigram entropy of train: {unigram_entropy(counts):.4f} nats per token")
    lines.append(f"entries of the vocabulary that train never uses: {int((counts == 0).sum()):,} of {len(counts):,}")
    return "\n".join(lines)


def count_tokens(folder: Path, manifest: Manifest) -> np.ndarray:
    """How often each id stands in the train blocks: int64 (vocab_size,)."""
    blocks = Blocks(folder, "train")
    counts = np.zeros(manifest.tokenizer.vocab_size, dtype=np.int64)
    for shard in range(len(manifest.splits["train"].shards)):
        counts += np.bincount(blocks.shard_tokens(shard), minlength=len(counts))
    counts[blocks.fill_token_id] -= manifest.splits["train"].num_padding_tokens
    return counts


def unigram_entropy(counts: np.ndarray) -> float:
    """-sum p ln p in nats, p being the tokens' frequencies."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def describe_catalogue() -> str:
    """All named datasets as a table."""
    head = ("name", "documents", "text", "tokens", "licence", "tokenizer", "block", "what it is")
    rows = [head]
    for name in entry_names():
        entry = load_entry(name)
        numbers = [
            format_count(entry.num_documents) if entry.num_documents else "-",
            format_bytes(entry.num_bytes) if entry.num_bytes else "-",
            format_count(entry.num_tokens) if entry.num_tokens else "-",
        ]
        tokenizer = entry.default_tokenizer
        shown = f"train:{tokenizer['train']}" if isinstance(tokenizer, dict) else tokenizer
        buckets = "".join(f"; /{bucket}: {condition}" for bucket, condition in entry.buckets.items())
        rows.append((name, *numbers, entry.licence, shown, str(entry.default_block_size), entry.description + buckets))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            "Prepare one: make prep DATASET=<name>. Where a number comes from: data_prep/datasets/<name>.yaml.",
            "What begins with / is a bucket: make prep DATASET=<name>/<bucket> prepares all of a dataset's, apart.",
        ]
    )
