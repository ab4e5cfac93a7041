"""Text to token ids: the one place that knows the encoding library.

In: a batch of documents. Out: their ids as one array, each document's length in ids. Worked example, a tokenizer whose
`a` is 7 and `b` is 8, which writes BOS (0), EOS being 1: `encode(["ab", ""])` gives ([7, 8], [2, 0]), `add_separators`
makes 0 7 8 1 0 1 of it.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

from data_prep.manifest import TokenizerInfo


def encoder_name() -> str:
    """What encodes, with its version: part of the manifest."""
    return f"tokenizers {version('tokenizers')}"


class Encoder:
    """A tokenizer whose control tokens cannot come out of text.

    `[EOT]` in a document stays the characters that it is.
    """

    def __init__(self, folder: Path, info: TokenizerInfo):
        from tokenizers import Tokenizer

        raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        control = {info.bos_token_id, info.eos_token_id, info.pad_token_id, info.unk_token_id}
        for token in raw["added_tokens"]:
            token["special"] |= token["id"] in control  # encode_special_tokens only knows the ones marked special
        self._tokenizer = Tokenizer.from_str(json.dumps(raw))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, one after the other (uint32), and the number of ids of each text (int64)."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        return np.concatenate(ids), np.array([len(each) for each in ids], dtype=np.int64)


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
