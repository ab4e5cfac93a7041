r"""Characters that the fast encoder takes for letters, digits or neither, and the reference does not.

In: a pre-tokenizer, whose pattern asks for \p{L} and \p{N}. Out: every character of Unicode whose class the two see
differently, since each library has the tables of another version of Unicode (gigatoken 0.10 those of Unicode 17,
tokenizers 0.23 those of 16: 4,657 characters that came in between). A document that holds one is the reference's work.

To see the class of a character whatever the vocabulary is, both get a tokenizer with the same pre-tokenizer and merges
across the borders of pieces: `!` before a character is one piece, and merged with its first byte, exactly where the
character is neither letter nor digit nor space; `a` where it is a letter, `1` where it is a digit.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import Any

import numpy as np

from data_prep.encoder import Ranges, ReferenceEncoder, reference_name
from data_prep.fast_encoder import FastEncoder, fast_checksum
from data_prep.paths import cache_dir
from data_prep.token_bytes import byte_level_alphabet

# Where there are characters: nothing between U+3FFFF and U+E0000 was ever assigned, and behind it is private use.
_ASSIGNED = (range(0x80, 0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))
_AT_ONCE = 64  # characters in a text, since each text costs


def find_disputed(pre_tokenizer: dict[str, Any] | None) -> Ranges:
    """All disputed characters; known from the last time for these very encoders.

    Args:
        pre_tokenizer: of tokenizer.json; None splits nothing, and knows no classes.
    """
    if pre_tokenizer is None:
        return ()
    what = json.dumps([pre_tokenizer, fast_checksum(), reference_name(), [str(each) for each in _ASSIGNED]])
    known = cache_dir() / "disputed" / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        return tuple((first, last) for first, last in json.loads(known.read_text(encoding="utf-8")))
    raw = _class_tokenizer(pre_tokenizer)
    fast, exact = FastEncoder(raw), ReferenceEncoder(raw)
    characters = [chr(number) for each in _ASSIGNED for number in each]
    groups = [characters[i : i + _AT_ONCE] for i in range(0, len(characters), _AT_ONCE)]
    suspects = [character for group in _differing(groups, fast, exact) for character in group]
    found = [ord(character[0]) for character in _differing([[each] for each in suspects], fast, exact)]
    ranges = _as_ranges(found)
    with suppress(OSError):
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(ranges), encoding="utf-8")
    return ranges


def _differing(groups: list[list[str]], fast: FastEncoder, exact: ReferenceEncoder) -> list[list[str]]:
    if not groups:
        return []
    texts = ["".join(f"!{c}a{c}1{c}'{c}b" for c in group) for group in groups]
    ids, lengths = fast.encode(texts)
    exact_ids, exact_lengths = exact.encode(texts)
    ours, theirs = (
        np.split(each, np.cumsum(sizes)[:-1]) for each, sizes in ((ids, lengths), (exact_ids, exact_lengths))
    )
    return [group for group, a, b in zip(groups, ours, theirs, strict=True) if not np.array_equal(a, b)]


def _class_tokenizer(pre_tokenizer: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json of all bytes, and of the merges that show where pieces begin and end."""
    byte = {number: character for character, number in byte_level_alphabet().items()}
    merges = [[byte[left], byte[first]] for left in b"!a1'" for first in range(0xC2, 0xF5)]
    merges += [[byte[last], byte[ord("b")]] for last in range(0x80, 0xC0)]  # 's and its like end in front of the b
    tokens = [*byte.values(), *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "fuse_unk": False, "byte_fallback": False}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": pre_tokenizer, "model": model}


def _as_ranges(numbers: list[int]) -> Ranges:
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return tuple((first, last) for first, last in ranges)
