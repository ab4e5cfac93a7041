"""Which bytes of which documents a range of tokens holds.

In: a prepared dataset, a split and a range of positions in its blocks. Out: one part per piece of a document, with the
range of UTF-8 bytes of the document's text as it was tokenized, counted on demand from the lengths of the tokens;
nothing of it is stored.

    document "naïve plan" = [BOT] "na" "ïv" "e pl" | "an" [EOT], cut by a block border at |
        this block: tokens 0 ... 4, bytes 0-9        the next one: tokens 4 ... 6, bytes 9-11

Where a tokenizer changes text first (a normaliser, the space that SentencePiece puts in front), the bytes are those of
the changed text: `Vocabulary.differences` says so in words, `Part.num_bytes` beside `Document.num_bytes` in numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.blocks import Blocks
from data_prep.documents import Document, DocumentMap, Piece
from data_prep.vocabulary import Vocabulary, on_one_line

_AT_ONCE = 1 << 20  # tokens that are looked at together: what is made of them stays in the cache


@dataclass(frozen=True)
class Part:
    """What a range of positions of a split holds of one document.

    `text_bytes[first_byte:end_byte]` of the document's text as tokenized are exactly the bytes of those tokens. That
    text has `num_bytes`; None where the document ends beyond the last block, so that they cannot be counted.
    """

    piece: Piece
    first_byte: int
    end_byte: int
    num_bytes: int | None

    @property
    def document(self) -> Document:
        """The document."""
        return self.piece.document

    @property
    def first_token(self) -> int:
        """Position of the first token."""
        return self.piece.first_token

    @property
    def end_token(self) -> int:
        """Position behind the last token."""
        return self.piece.end_token


def parts_between(
    folder: str | Path, split: str, first_token: int, end_token: int
) -> tuple[list[Part], tuple[str, ...]]:
    """The documents at the positions [first_token, end_token) of a split with their byte ranges.

    Returns:
        The parts, in order; and one sentence for each way in which text as tokenized may differ from the source.
    Raises:
        UserError: no such dataset, or a tokenizer whose tokens do not give the text back.
    """
    blocks, documents, vocabulary = Blocks(folder, split), DocumentMap(folder, split), Vocabulary(folder)
    parts = find_parts(blocks, documents, vocabulary.lengths, first_token, end_token)
    return parts, tuple(vocabulary.differences)


def find_parts(
    blocks: Blocks, documents: DocumentMap, lengths: np.ndarray, first_token: int, end_token: int
) -> list[Part]:
    """The documents at the positions [first_token, end_token) of a split, in their order, with their byte ranges.

    Args:
        lengths: bytes of each token id.
    """

    def count(first: int, end: int) -> int:
        """Bytes of tokens [first, end) of the stream."""
        return sum(count_bytes(blocks, lengths, *each) for each in documents.ranges(first, end))

    parts = []
    for piece in documents.pieces(first_token, end_token):
        document = piece.document
        first = document.first_token + piece.offset
        end = first + piece.end_token - piece.first_token
        first_byte = count(document.first_token, first)
        end_byte = first_byte + count_bytes(blocks, lengths, piece.first_token, piece.end_token)
        is_whole = documents.piece_map is not None or document.end_token <= blocks.num_tokens
        parts.append(Part(piece, first_byte, end_byte, end_byte + count(end, document.end_token) if is_whole else None))
    return parts


def count_bytes(blocks: Blocks, lengths: np.ndarray, first_token: int, end_token: int) -> int:
    """Bytes of text at the positions [first_token, end_token) of a split, none of them padding."""
    return sum(int(lengths[tokens].sum()) for tokens in iter_tokens(blocks, first_token, end_token))


def iter_tokens(blocks: Blocks, first_token: int, end_token: int) -> Iterator[np.ndarray]:
    """Tokens at the positions [first_token, end_token) in order: views of the memory map, of a million at most."""
    at = first_token
    while at < end_token:
        shard = int(blocks.locate(np.array(at // blocks.block_size))[0])
        start = int(blocks.shard_starts[shard]) * blocks.block_size
        tokens = blocks.shard_tokens(shard)[at - start : min(end_token - start, at - start + _AT_ONCE)]
        yield tokens
        at += len(tokens)


def describe_document(document: Document, which: str) -> str:
    """One line: where a document comes from, `which` bytes of it, and what the corpus says of it."""
    kept = "".join(f", {name} {value}" for name, value in document.columns.items() if value is not None)
    return on_one_line(f"{document.source}, record {document.record:,}, {which}{kept}")


def describe_part(part: Part) -> str:
    """One line: where the text comes from, and which bytes of it are here."""
    num_bytes = part.document.num_bytes
    of = f"{num_bytes:,}"
    if part.num_bytes not in (None, num_bytes):
        of = f"{part.num_bytes:,} as tokenized ({num_bytes:,} in the source)"
    return describe_document(part.document, f"bytes {part.first_byte:,}-{part.end_byte:,} of {of}")
