"""A split of a prepared dataset as text: ranges of its tokens decoded, with the documents in them.

In: a dataset's folder and a split. Out: text for people. It is decoded from the tokens, so what is shown is what a
model sees; what would steer a terminal is shown as a sign.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.blocks import Blocks
from data_prep.documents import Document, DocumentMap, Piece
from data_prep.errors import UserError
from data_prep.parts import describe_document, describe_part, find_parts
from data_prep.tokenizer_folder import load_backend
from data_prep.vocabulary import Vocabulary, on_one_line, show_unseen

MAX_SHOWN_TOKENS = 200  # at each end of a text
BOLD, BORDER, CONTROL, QUIET = "1", "36", "7;2", "2"  # styles, as terminals number them


class DatasetText:
    """One split to read.

    `notes` are whole sentences: how text may differ from its source. `vocabulary` is None for a tokenizer whose tokens
    do not give the text back: then text is what its decoder makes of them, and byte ranges are not known.

    Args:
        colours: Mark control tokens, and what is left out, with a terminal's styles.
    """

    def __init__(self, folder: Path, split: str, colours: bool = False):
        self.folder, self.colours = folder, colours
        self.blocks, self.documents = Blocks(folder, split), DocumentMap(folder, split)
        self.backend = load_backend(folder / "tokenizer")
        self.vocabulary: Vocabulary | None = None
        try:
            self.vocabulary = Vocabulary(folder)
            self.notes = self.vocabulary.differences
        except UserError as error:
            self.notes = [f"Without byte ranges: {error}"]

    def text(self, first_token: int, end_token: int, is_whole: bool = False) -> str:
        """Tokens [first_token, end_token) of the stream, such as a document's, as `text_at` shows them."""
        ranges = self.documents.ranges(first_token, end_token)
        text = self.text_at(ranges, is_whole)
        num_beyond = end_token - first_token - sum(end - first for first, end in ranges)
        return text + self.paint(f"\n[... {num_beyond:,} tokens lie beyond the last block]", QUIET) * (num_beyond > 0)

    def text_at(self, ranges: list[tuple[int, int]], is_whole: bool = False) -> str:
        """The tokens at these positions of the blocks, without a long middle unless `is_whole`."""
        positions = np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(*each) for each in ranges)])
        num_left = len(positions) - 2 * MAX_SHOWN_TOKENS
        if num_left <= 0 or is_whole:
            return self._decode(positions)
        middle = self.paint(f"[... {num_left:,} tokens not shown ...]", QUIET)
        head, tail = self._decode(positions[:MAX_SHOWN_TOKENS]), self._decode(positions[-MAX_SHOWN_TOKENS:])
        return "\n".join([head, middle, tail])

    def pieces(self, first: int, end: int) -> Iterator[tuple[Piece, str]]:
        """What the positions [first, end) of the blocks hold of documents, and where each comes from."""
        if self.vocabulary is not None:
            for part in find_parts(self.blocks, self.documents, self.vocabulary.lengths, first, end):
                yield part.piece, describe_part(part)
            return
        for piece in self.documents.pieces(first, end):
            yield piece, self.describe(piece.document)

    def describe(self, document: Document) -> str:
        """Where a whole document comes from, and how long it is."""
        where = describe_document(document, f"{document.num_bytes:,} bytes")
        return f"{where}, {document.end_token - document.first_token:,} tokens"

    def show_token(self, token: int) -> str:
        """One id for people, on one line."""
        if self.vocabulary is None:
            return on_one_line(str(self.backend.id_to_token(token)))
        return on_one_line(self.vocabulary.show(token))

    def paint(self, text: str, style: str) -> str:
        """The text in a style, where there are colours; line ends in front of it stay plain."""
        plain = text.lstrip("\n")
        return text[: len(text) - len(plain)] + f"\x1b[{style}m{plain}\x1b[0m" if self.colours else text

    def _decode(self, positions: np.ndarray) -> str:
        tokens = self.blocks.token_at(positions)
        if self.vocabulary is None:
            return show_unseen(self.backend.decode(tokens.tolist(), skip_special_tokens=False))
        pieces = [show_unseen(text) for text in self.vocabulary.texts(tokens)]
        return "".join(
            self.paint(text, CONTROL) if self.vocabulary.is_control(token) else text
            for text, token in zip(pieces, tokens.tolist(), strict=True)
        )
