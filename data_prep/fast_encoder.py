"""The fast encoder, and what it has to show before its ids are taken for the reference's.

gigatoken encodes many times as fast as the `tokenizers` library, which stays the reference: what a document's ids are
is what `tokenizers` says. Four gates:

    structure   only kinds of tokenizer.json that were tried against the reference; everything else is the reference's
    characters  which characters are letters and digits to the one and not to the other (data_prep/disputed.py): a
                document with one of them is the reference's
    start       a fixed hostile set, and the first ids of every unit of this very corpus, a million together (all of it
                if smaller), are equal
    sampling    during the preparation one document in 1,000, chosen by its hash, is encoded by both

A mismatch in the hostile set means the reference from the beginning; one in the corpus keeps the document as evidence
and does everything again with the reference. Nothing is complete before all comparisons were equal.
"""

from __future__ import annotations

import random
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

SAMPLED_IN = 1000  # one document in so many, by its hash, is encoded by both
# Patterns of pre-tokenizers for which gigatoken was compared with the reference, as tokenizer.json files have them.
PATTERNS = {
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "Qwen 2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}
_NUM_HOSTILE = 5000
_SPACES = [" ", "  ", "\n", "\r\n", "\t", *"\u00a0\u180e\u200b\u2009\u3000\ufeff\x00\x85"]
_PIECES = """
    's 'T 'll ’re I'VE don't 1 12 1234567 ３ ½ Ⅷ _ ... !? é e\u0301 ﬁ İ ß Straße ﷺ \u0300\u0301 हिन्दी ไทย 東京都 한국어
    العربية עברית 🙂 👩\u200d👩\u200d👧 🇩🇪 \U0001f3f4\U000e0067 \ud7ff \ue000 \U0010ffff Ġ ▁ Ċ <0x0A> </s>
"""


class EncoderMismatchError(Exception):
    """During a preparation the fast encoder gave other ids than the reference.

    Args:
        evidence: file and record of the document, its text, and both lists of ids.
    """

    def __init__(self, evidence: dict[str, Any]):
        super().__init__(evidence)
        self.evidence = evidence


def fast_name() -> str | None:
    """The fast encoder with its version; None where it is not installed."""
    try:
        return f"gigatoken {version('gigatoken')}"
    except PackageNotFoundError:
        return None


def fast_checksum() -> str:
    """XXH3 of its machine code: two builds may have one version."""
    spec = find_spec("gigatoken")
    code = sorted(path for path in Path(spec.origin).parent.rglob("*") if path.suffix in (".so", ".pyd", ".dylib"))
    return xxhash.xxh3_128_hexdigest(b"".join(path.read_bytes() for path in code))


def structure_problem(raw: dict[str, Any]) -> str | None:
    """Gate 1: why a tokenizer.json is not of a kind that the fast encoder is known to do right; None if it is.

    Args:
        raw: its content, in which all control tokens are marked special.
    """
    model, normalizer, pre = raw["model"], raw.get("normalizer"), raw.get("pre_tokenizer")
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}, not BPE"
    if model.get("dropout"):
        return f"it has BPE dropout of {model['dropout']}"
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            return f"its model has {name}"
    plain = [token["content"] for token in raw.get("added_tokens", []) if not token["special"]]
    if plain:
        return f"it has added tokens that are no control tokens, such as {plain[0]!r}"
    if normalizer is not None:
        kinds = [each.get("type") for each in normalizer.get("normalizers", [])]
        if (normalizer.get("type"), kinds) != ("Sequence", ["Prepend", "Replace"]) or pre is not None:
            return f"it has a normalizer of type {normalizer.get('type')}"
        return None if model.get("byte_fallback") else "it has a normalizer but no byte_fallback"
    parts = pre.get("pretokenizers", []) if pre and pre.get("type") == "Sequence" else [pre]
    kinds = [part.get("type") if part else None for part in parts]
    if kinds == ["ByteLevel"]:
        return None if parts[0].get("use_regex", True) else "its ByteLevel pre-tokenizer splits nothing"
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        split = parts[0]
        is_known = split["pattern"].get("Regex") in PATTERNS.values()
        if is_known and split["behavior"] == "Isolated" and not split["invert"]:
            return None
        return "its pre-tokenizer splits by a pattern that was not tried"
    return f"its pre-tokenizer is {' + '.join(map(str, kinds))}"


class FastEncoder:
    """gigatoken with a tokenizer whose control tokens cannot come out of text.

    Args:
        raw: content of tokenizer.json, in which all control tokens are marked special.
    Raises:
        Exception: of gigatoken, which refuses some tokenizers.
    """

    def __init__(self, raw: dict[str, Any]):
        import gigatoken

        # gigatoken has no switch for it: without its control tokens it knows no text that stands for one
        kept = [token for token in raw["added_tokens"] if not token["special"]]
        text = orjson.dumps({**raw, "added_tokens": kept, "post_processor": None})
        self._tokenizer = gigatoken.Tokenizer.from_json(text)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, one after the other (uint32), and the number of ids of each text (int64)."""
        layout = self._tokenizer.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data).astype(np.int64)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


def _scalar(number: int) -> int:
    """The code point of a number, surrogates left out."""
    return number if number < 0xD800 else number + 0x800


def hostile_texts(words: list[str]) -> list[str]:
    """Gate 2: texts in which encoders have differed, always the same ones.

    Args:
        words: what must stay text, such as the spellings of control tokens.
    """
    rng = random.Random(20)
    pieces = [*_SPACES, *_PIECES.split(), *words]
    texts = [*pieces, "", " " * 300, "\n" * 300, "a" * 3000, "é" * 1000, "東" * 1000, "1" * 1000, "ab " * 500]
    while len(texts) < _NUM_HOSTILE:
        kind = rng.random()
        if kind < 0.5:
            text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 12)))
        elif kind < 0.8:
            text = "".join(chr(_scalar(rng.randrange(0x110000 - 0x800))) for _ in range(rng.randint(1, 20)))
        else:
            text = "".join(rng.choice([chr(rng.randint(32, 126)), *_SPACES[:5]]) for _ in range(rng.randint(1, 40)))
        texts.append(text)
    return texts
