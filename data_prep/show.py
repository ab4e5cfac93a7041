"""Looking at a prepared dataset: documents, blocks and ranges of tokens as text; and the table of named datasets.

In: a prepared dataset. Out: lines for people.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.catalog import entry_names, load_entry
from data_prep.dataset_text import BOLD, BORDER, DatasetText
from data_prep.errors import UserError
from data_prep.sizes import format_bytes, format_count, format_table


@dataclass(frozen=True)
class Wanted:
    """What to show: `num_documents` from `first_document` on, then `num_blocks` from `first_block` on.

    With `tokens` only the documents of that range. `is_whole` leaves no long middle out.
    """

    split: str = "train"
    num_documents: int = 3
    first_document: int = 0
    num_blocks: int = 3
    first_block: int = 0
    tokens: tuple[int, int] | None = None
    is_whole: bool = False


def iter_inspection(folder: Path, wanted: Wanted, colours: bool = False) -> Iterator[str]:
    """Lines: documents and blocks, the borders of documents marked, with where each document comes from.

    Raises:
        UserError: the range of tokens lies beyond the last block.
    """
    text = DatasetText(folder, wanted.split, colours)
    blocks, documents = text.blocks, text.documents
    blocks_text = f"{blocks.num_blocks:,} blocks of {blocks.block_size:,} tokens"
    yield f"{folder}/{wanted.split}: {len(documents):,} documents, {blocks_text}"
    yield from text.notes
    if wanted.tokens is not None:
        first, end = wanted.tokens
        if end > blocks.num_tokens:
            raise UserError(
                f"{folder}: --tokens is {first}-{end} but the blocks of {wanted.split} hold "
                f"{blocks.num_tokens} tokens. Name a range of 0-{blocks.num_tokens}."
            )
        yield text.paint(f"\n=== tokens {first:,} to {end:,}", BOLD)
        yield from _iter_pieces(text, first, end, "", wanted.is_whole)
        return
    for number in range(wanted.first_document, min(wanted.first_document + wanted.num_documents, len(documents))):
        document = documents.document(number)
        yield text.paint(f"\n=== document {number:,}: {text.describe(document)}", BOLD)
        yield text.text(document.first_token, document.end_token, wanted.is_whole)
    for number in range(wanted.first_block, min(wanted.first_block + wanted.num_blocks, blocks.num_blocks)):
        start, end = number * blocks.block_size, (number + 1) * blocks.block_size
        yield text.paint(f"\n=== block {number:,}: tokens {start:,} to {end:,}", BOLD)
        where = " in another block" if blocks.is_padded else " in the next block"
        yield from _iter_pieces(text, start, end, where, wanted.is_whole)
        num_padding = blocks.block_size - int(blocks.lengths_of(np.array(number)))
        if num_padding:
            yield text.paint(f"--- {num_padding:,} of padding", BORDER)
    remainder = blocks.manifest.splits[wanted.split].remainder_tokens
    if remainder:
        yield f"\n{remainder:,} tokens at the end of the split fill no block."


def _iter_pieces(text: DatasetText, first: int, end: int, where: str, is_whole: bool) -> Iterator[str]:
    for piece, source in text.pieces(first, end):
        begun = " (begun earlier)" if piece.is_begun else ""
        yield text.paint(f"--- document {piece.document.number:,}{begun}: {source}", BORDER)
        yield text.text_at([(piece.first_token, piece.end_token)], is_whole)
        yield text.paint(f"--- goes on{where}" if piece.goes_on else "--- end of document", BORDER)


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
    return "\n".join(
        [
            *format_table(rows, is_text=True),
            "",
            "Prepare one: make prep DATASET=<name>. Where a number comes from: data_prep/datasets/<name>.yaml.",
            "What begins with / is a bucket: make prep DATASET=<name>/<bucket> prepares all of a dataset's, apart.",
        ]
    )
