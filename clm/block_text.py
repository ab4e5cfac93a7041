"""A prepared block as text: which bytes of which documents it holds, and what each token reads.

In: a split and a block number. Out: its parts, one per document, each with the range of UTF-8 bytes of the document's
text as it was tokenized; and one piece of text per token.

    document "naïve plan" = [BOT] "na" "ïv" "e pl" | "an" [EOT], cut by a block border at |
        this block: tokens 0 ... 4, bytes 0-9        the next one: tokens 4 ... 6, bytes 9-11
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from data_prep.blocks import NO_TARGET, Blocks
from data_prep.documents import Document, DocumentMap, Piece
from data_prep.token_bytes import differences_from_source, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_AT_ONCE = 1 << 20  # tokens whose bytes are summed at once
# What a terminal would obey and HTML cannot hold: control characters except tab and newline, and marks that turn the
# direction of what follows.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Vocabulary:
    """What each token id stands for: its bytes, or the name of a control token.

    Args:
        tokenizer: of the prepared data.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.table = token_bytes(tokenizer)
        self.lengths = np.array([len(token) for token in self.table], dtype=np.int64)
        self.names = tokenizer.convert_ids_to_tokens(range(len(self.table)))
        self.eos_token_id: int = tokenizer.eos_token_id
        self.differences = differences_from_source(tokenizer)

    def is_control(self, token: int) -> bool:
        """Whether a token stands for no text."""
        return not self.table[token]

    def show(self, token: int) -> str:
        """One token for people: ' the', b'\\xf0\\x9f' for a part of a character, [EOT] for a control token."""
        if self.is_control(token):
            return str(self.names[token])
        try:
            return repr(self.table[token].decode())
        except UnicodeDecodeError:
            return repr(self.table[token])

    def texts(self, tokens: np.ndarray) -> list[str]:
        """The text of consecutive tokens, a piece for each: a character belongs to the token that completes it.

        Control tokens read as their names. Bytes that are no character, since a block begins or ends inside one, read
        as U+FFFD.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        out: list[str] = []
        for token in tokens.tolist():
            if not self.is_control(token):
                out.append(decoder.decode(self.table[token]))
                continue
            if out:
                out[-1] += decoder.decode(b"", final=True)
            out.append(str(self.names[token]))
        if out:
            out[-1] += decoder.decode(b"", final=True)
        return out


@dataclass(frozen=True)
class Part:
    """What a range of positions of a split holds of one document.

    `text_bytes[first_byte:end_byte]` of the document's text as tokenized are exactly the bytes of those tokens.
    """

    piece: Piece
    first_byte: int
    end_byte: int

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


@dataclass
class BlockText:
    """One prepared block of P tokens with all that is known of it.

    `tokens` is (P + 1,) as `Blocks.read` gives it: the last is the one that follows, or NO_TARGET; NO_TARGET for
    padding. `losses` is (P,): position i holds the loss of token i + 1.
    """

    dataset: str
    block: int
    shard_file: str
    shard_row: int
    tokens: np.ndarray
    parts: list[Part]
    seen_as: dict[str, int] = field(default_factory=dict)  # sample, rank, micro_batch, where it is part of a step
    losses: np.ndarray | None = None

    @property
    def first_token(self) -> int:
        """Position of its first token in the split."""
        return self.block * (len(self.tokens) - 1)

    @property
    def num_tokens(self) -> int:
        """Tokens in the block without padding."""
        return int(np.count_nonzero(self.tokens[:-1] != NO_TARGET))

    @property
    def mean_loss(self) -> float:
        """Nats per target, NaN without losses."""
        return mean(self.losses)

    def loss_of(self, position: int) -> float:
        """The loss of the token at a position of the block, 0 ... P; NaN where nothing in the block predicts it."""
        return float("nan") if self.losses is None or position == 0 else float(self.losses[position - 1])


def read_block(blocks: Blocks, documents: DocumentMap | None, name: str, block: int, lengths: np.ndarray) -> BlockText:
    """One block with its documents; without a document map, `parts` is empty."""
    shard, row = (int(each) for each in blocks.locate(np.array(block)))
    first, end = block * blocks.block_size, (block + 1) * blocks.block_size
    file = blocks.manifest.splits[blocks.split].shards[shard].file
    parts = [] if documents is None else find_parts(blocks, documents, lengths, first, end)
    return BlockText(name, block, file, row, blocks.read(np.array([block]))[0], parts)


def find_parts(
    blocks: Blocks, documents: DocumentMap, lengths: np.ndarray, first_token: int, end_token: int
) -> list[Part]:
    """The documents at the positions [first_token, end_token) of a split, in their order, with their byte ranges.

    Args:
        lengths: bytes of each token id.
    """
    parts = []
    for piece in documents.pieces(first_token, end_token):
        begin = piece.document.first_token
        before = documents.ranges(begin, begin + piece.offset)
        first_byte = sum(count_bytes(blocks, lengths, *each) for each in before)
        num_bytes = count_bytes(blocks, lengths, piece.first_token, piece.end_token)
        parts.append(Part(piece, first_byte, first_byte + num_bytes))
    return parts


def count_bytes(blocks: Blocks, lengths: np.ndarray, first_token: int, end_token: int) -> int:
    """Bytes of text at the positions [first_token, end_token) of a split, none of them padding."""
    total, at = 0, first_token
    while at < end_token:
        shard = int(blocks.locate(np.array(at // blocks.block_size))[0])
        start = int(blocks.shard_starts[shard]) * blocks.block_size
        tokens = blocks.shard_tokens(shard)[at - start : min(end_token - start, at - start + _AT_ONCE)]
        total += int(lengths[tokens].sum())
        at += len(tokens)
    return total


def mean(losses: np.ndarray | None) -> float:
    """The mean over the targets that there are, NaN for none."""
    there = [] if losses is None else losses[~np.isnan(losses)]
    return float(np.mean(there, dtype=np.float64)) if len(there) else float("nan")


def show_unseen(text: str) -> str:
    """Text that is safe to show: what would steer a terminal or turn the reading direction becomes a visible sign."""

    def sign(match: re.Match) -> str:
        code = ord(match[0])
        if code < 0x20:
            return chr(0x2400 + code)  # the Unicode block Control Pictures
        return "␡" if code == 0x7F else f"<U+{code:04X}>"

    return _UNSEEN.sub(sign, text)


def on_one_line(text: str) -> str:
    """As show_unseen, and line ends and tabs as visible signs too."""
    return show_unseen(text).replace("\n", "␊").replace("\t", "␉")


def describe_document(document: Document, which: str) -> str:
    """One line: where a document comes from, `which` bytes of it, and what the corpus says of it."""
    kept = "".join(f", {name} {value}" for name, value in document.columns.items() if value is not None)
    return on_one_line(f"{document.source}, record {document.record:,}, {which}{kept}")


def describe_part(part: Part) -> str:
    """One line: where the text comes from, and which bytes of it are here."""
    which = f"bytes {part.first_byte:,}-{part.end_byte:,} of {part.document.num_bytes:,}"
    return describe_document(part.document, which)
