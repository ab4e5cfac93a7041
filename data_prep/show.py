"""Looking at a prepared dataset: documents, blocks and ranges of tokens as text; and the table of named datasets.

In: a prepared dataset. Out: text for people. Documents are decoded from their tokens, so what is shown is what a model
sees; what would steer a terminal is shown as a sign.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.blocks import Blocks
from data_prep.catalog import entry_names, load_entry
from data_prep.documents import Document, DocumentMap
from data_prep.errors import UserError
from data_prep.parts import Part, describe_document, describe_part, find_parts
from data_prep.sizes import format_bytes, format_count
from data_prep.tokenizer_folder import load_backend
from data_prep.vocabulary import Vocabulary, show_unseen

MAX_SHOWN_TOKENS = 200  # at each end of a text
_BOLD, _BORDER, _CONTROL, _QUIET = "1", "36", "7;2", "2"  # as terminals number them


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
    return _Inspection(folder, wanted, colours).lines()


class _Inspection:
    def __init__(self, folder: Path, wanted: Wanted, colours: bool):
        self.folder, self.wanted, self.colours = folder, wanted, colours
        self.blocks, self.documents = Blocks(folder, wanted.split), DocumentMap(folder, wanted.split)
        try:
            self.vocabulary = Vocabulary(folder)
            self.notes = self.vocabulary.differences
        except UserError as error:  # decoded all the same, as its tokenizer decodes
            self.vocabulary, self.notes = None, [f"Without byte ranges: {error}"]
            self.backend = load_backend(folder / "tokenizer")

    def lines(self) -> Iterator[str]:
        """Everything that is wanted."""
        wanted, blocks = self.wanted, self.blocks
        blocks_text = f"{blocks.num_blocks:,} blocks of {blocks.block_size:,} tokens"
        yield f"{self.folder}/{wanted.split}: {len(self.documents):,} documents, {blocks_text}"
        yield from self.notes
        if wanted.tokens is not None:
            first, end = wanted.tokens
            if end > blocks.num_tokens:
                raise UserError(
                    f"{self.folder}: --tokens is {first}-{end} but the blocks of {wanted.split} hold "
                    f"{blocks.num_tokens} tokens. Name a range of 0-{blocks.num_tokens}."
                )
            yield self._paint(f"\n=== tokens {first:,} to {end:,}", _BOLD)
            yield from self._range(first, end, "")
            return
        last = min(wanted.first_document + wanted.num_documents, len(self.documents))
        for number in range(wanted.first_document, last):
            document = self.documents.document(number)
            where = describe_document(document, f"{document.num_bytes:,} bytes")
            num_tokens = document.end_token - document.first_token
            yield self._paint(f"\n=== document {number:,}: {where}, {num_tokens:,} tokens", _BOLD)
            yield self._text(document.first_token, document.end_token)
        for number in range(wanted.first_block, min(wanted.first_block + wanted.num_blocks, blocks.num_blocks)):
            start, end = number * blocks.block_size, (number + 1) * blocks.block_size
            yield self._paint(f"\n=== block {number:,}: tokens {start:,} to {end:,}", _BOLD)
            yield from self._range(start, end, " in the next block")
        remainder = blocks.manifest.splits[wanted.split].remainder_tokens
        if remainder:
            yield f"\n{remainder:,} tokens at the end of the split fill no block."

    def _range(self, first_token: int, end_token: int, where: str) -> Iterator[str]:
        for document, first, end, source in self._parts(first_token, end_token):
            begun = "" if first == document.first_token else " (begun earlier)"
            yield self._paint(f"--- document {document.number:,}{begun}: {source}", _BORDER)
            yield self._text(first, end)
            yield self._paint("--- end of document" if end == document.end_token else f"--- goes on{where}", _BORDER)

    def _parts(self, first_token: int, end_token: int) -> Iterator[tuple[Document, int, int, str]]:
        """Each document with its tokens here, and where it comes from."""
        if self.vocabulary is not None:
            part: Part
            for part in find_parts(self.blocks, self.documents, self.vocabulary.lengths, first_token, end_token):
                yield part.document, part.first_token, part.end_token, describe_part(part)
            return
        for document in self.documents.between(first_token, end_token):
            first, end = max(document.first_token, first_token), min(document.end_token, end_token)
            yield document, first, end, describe_document(document, f"{document.num_bytes:,} bytes")

    def _text(self, first_token: int, end_token: int) -> str:
        """Tokens [first_token, end_token) as text, without a long middle and what no block holds."""
        end = max(min(end_token, self.blocks.num_tokens), first_token)
        num_left = end - first_token - 2 * MAX_SHOWN_TOKENS
        if num_left <= 0 or self.wanted.is_whole:
            text = self._decode(first_token, end)
        else:
            head = self._decode(first_token, first_token + MAX_SHOWN_TOKENS)
            tail = self._decode(end - MAX_SHOWN_TOKENS, end)
            text = "\n".join([head, self._paint(f"[... {num_left:,} tokens not shown ...]", _QUIET), tail])
        if end < end_token:
            text += self._paint(f"\n[... {end_token - end:,} tokens lie beyond the last block]", _QUIET)
        return text

    def _decode(self, first_token: int, end_token: int) -> str:
        tokens = self.blocks.token_at(np.arange(first_token, end_token))
        if self.vocabulary is None:
            return show_unseen(self.backend.decode(tokens.tolist(), skip_special_tokens=False))
        pieces = [show_unseen(text) for text in self.vocabulary.texts(tokens)]
        return "".join(
            self._paint(text, _CONTROL) if self.vocabulary.is_control(token) else text
            for text, token in zip(pieces, tokens.tolist(), strict=True)
        )

    def _paint(self, text: str, style: str) -> str:
        """The text in a style; line ends in front of it stay plain."""
        plain = text.lstrip("\n")
        return text[: len(text) - len(plain)] + f"\x1b[{style}m{plain}\x1b[0m" if self.colours else text


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
