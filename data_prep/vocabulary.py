"""The vocabulary of a prepared dataset as text: what each id reads, alone and beside others.

In: a dataset's tokenizer folder. Out: the bytes and the name of every id, and token ids as pieces of text. It needs the
`tokenizers` library alone. Text of a corpus may hold anything: `show_unseen` makes of it what is safe to print.
"""

import codecs
import os
import re
from pathlib import Path
from typing import TextIO

import numpy as np

from data_prep.filter_settings import CHANGING
from data_prep.manifest import load_manifest
from data_prep.token_bytes import backend_differences, backend_token_bytes
from data_prep.tokenizer_folder import load_backend

# What a terminal would obey and HTML cannot hold: control characters except tab and newline, and marks that turn the
# direction of what follows.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Vocabulary:
    """What each token id of a prepared dataset stands for: its bytes, or the name of a control token.

    Args:
        folder: of the dataset.
    Raises:
        UserError: a tokenizer whose tokens do not give the text back.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        manifest = load_manifest(folder)
        info = manifest.tokenizer
        backend = load_backend(folder / "tokenizer")
        control = {info.bos_token_id, info.eos_token_id, info.pad_token_id, info.unk_token_id} - {None}
        name = str(folder / "tokenizer")
        self.table = backend_token_bytes(backend, control, info.vocab_size, name)
        self.lengths = np.array([len(token) for token in self.table], dtype=np.int64)
        self.names = [backend.id_to_token(id_) for id_ in range(info.vocab_size)]
        self.eos_token_id = info.eos_token_id
        self.differences = backend_differences(backend, name)
        changing = [name for name in manifest.settings.get("filters", {}) if name in CHANGING]
        if changing:
            why = f"{', '.join(changing)} changed texts of this dataset"
            self.differences.append(f"{why}: byte ranges count in a text as changed, not in its source.")

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


def has_colours(stream: TextIO) -> bool:
    """Whether to colour what is printed: a terminal that can, and no NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
