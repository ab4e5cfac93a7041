"""Text to token ids: the one place that knows the encoding library.

In: a batch of documents. Out: their ids as one array, each document's length in ids. Worked example, a tokenizer whose
`a` is 7 and `b` is 8, which writes BOS (0), EOS being 1: `encode(["ab", ""])` gives ([7, 8], [2, 0]), `add_separators`
makes 0 7 8 1 0 1 of it.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_prep.fast_encoder import FastEncoder
from data_prep.manifest import TokenizerInfo

Ranges = tuple[tuple[int, int], ...]  # of code points: first, last


@dataclass(frozen=True)
class EncoderChoice:
    """Which encoder a preparation uses; `why` says why it is the reference.

    Of the fast one's ids `compare_ids` from the beginning of each unit are compared with the reference's. Documents
    with `disputed` characters are the reference's beside it.
    """

    name: str
    is_fast: bool
    why: str = ""
    compare_ids: int = 0
    disputed: Ranges = ()

    def for_manifest(self, num_compared: int) -> dict[str, Any]:
        """What a reader of the dataset can know about it."""
        if not self.is_fast:
            return {"name": self.name, "why": self.why}
        return {
            "name": self.name,
            "compared_with": reference_name(),
            "num_ids_compared": num_compared,
            "disputed_characters": [list(each) for each in self.disputed],  # first and last: left to the reference
        }


def reference_name() -> str:
    """The reference with its version."""
    return f"tokenizers {version('tokenizers')}"


def load_tokenizer_json(folder: Path, info: TokenizerInfo) -> dict[str, Any]:
    """tokenizer.json, in which every control token is marked special."""
    raw = orjson.loads((folder / "tokenizer.json").read_bytes())
    control = {info.bos_token_id, info.eos_token_id, info.pad_token_id, info.unk_token_id}
    for token in raw["added_tokens"]:
        token["special"] |= token["id"] in control
    return raw


class ReferenceEncoder:
    """The `tokenizers` library with a tokenizer whose control tokens cannot come out of text.

    `[EOT]` in a document stays the characters that it is.
    """

    def __init__(self, raw: dict[str, Any]):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_buffer(orjson.dumps(raw))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, one after the other (uint32), and the number of ids of each text (int64)."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        return np.concatenate(ids), np.array([len(each) for each in ids], dtype=np.int64)


class Encoder:
    """The encoder that was chosen, and the reference beside it.

    Args:
        disputed: ranges (first, last) of characters; a document with one of them is encoded by the reference.
    """

    def __init__(self, folder: Path, info: TokenizerInfo, is_fast: bool, disputed: Ranges = ()):
        self._first_bytes = sorted({chr(end).encode()[0] for each in disputed for end in each})
        spans = "".join(f"{chr(first)}-{chr(last)}" for first, last in disputed)
        self._disputed = re.compile(f"[{spans}]") if spans else None
        self._raw = load_tokenizer_json(folder, info)
        self.is_fast = is_fast
        self._fast = FastEncoder(self._raw) if is_fast else None

    @cached_property
    def reference(self) -> ReferenceEncoder:
        """What the ids have to be; loaded when it is first needed."""
        return ReferenceEncoder(self._raw)

    def encode(self, texts: list[str], data: list[bytes] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, one after the other (uint32), and the number of ids of each text (int64).

        Args:
            data: The texts in UTF-8, where the caller has them.
        """
        if self._fast is None:
            return self.reference.encode(texts)
        ids, lengths = self._fast.encode(texts)
        apart = [i for i, each in enumerate(data or (text.encode() for text in texts)) if self._is_disputed(each)]
        if apart:
            exact, exact_lengths = self.reference.encode([texts[i] for i in apart])
            pieces = np.split(ids, np.cumsum(lengths)[:-1])
            for i, piece in zip(apart, np.split(exact, np.cumsum(exact_lengths)[:-1]), strict=True):
                pieces[i] = piece
            ids, lengths = np.concatenate(pieces), np.array([len(piece) for piece in pieces], dtype=np.int64)
        return ids, lengths

    def _is_disputed(self, data: bytes) -> bool:
        """Most texts hold not even the first byte of such a character, which is found much faster than they are."""
        return any(byte in data for byte in self._first_bytes) and self._disputed.search(data.decode()) is not None


def add_separators(ids: np.ndarray, lengths: np.ndarray, info: TokenizerInfo) -> tuple[np.ndarray, np.ndarray]:
    """Documents with BOS in front, where the tokenizer writes it, and EOS behind.

    Ids and lengths, separators counted.
    """
    num_before = int(info.is_bos_written)
    full_lengths = lengths + num_before + 1
    ends = np.cumsum(full_lengths)
    out = np.empty(int(ends[-1]) if len(ends) else 0, dtype=ids.dtype)
    is_text = np.ones(len(out), dtype=bool)
    is_text[ends - 1] = False
    out[ends - 1] = info.eos_token_id
    if info.is_bos_written:
        is_text[ends - full_lengths] = False
        out[ends - full_lengths] = info.bos_token_id
    out[is_text] = ids
    return out, full_lengths
