"""The UTF-8 bytes that each token id stands for: what turns a loss per token into bits per byte, and ids into text.

In: a Hugging Face tokenizer. Out: the bytes of every id, or their number. The bytes of a document's tokens, joined, are
its text exactly as it was tokenized; `differences_from_source` says where that is not the text of the source (for
SentencePiece-BPE, the one space that its normaliser puts in front).
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def token_byte_lengths(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """UTF-8 bytes of each id, control tokens 0: int64 (len(tokenizer),).

    Raises:
        UserError: a tokenizer that is neither byte-level nor SentencePiece-BPE: its tokens do not give the text back.
    """
    return np.array([len(each) for each in token_bytes(tokenizer)], dtype=np.int64)


def token_bytes(tokenizer: "PreTrainedTokenizerFast") -> list[bytes]:
    """The bytes of each id, empty for control tokens and for holes in the vocabulary.

    A token may be a part of a character: only the bytes of a whole document are sure to be UTF-8.

    Raises:
        UserError: as token_byte_lengths.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    is_byte_level = _is_byte_level(backend, tokenizer.name_or_path)
    added = {token["id"]: token for token in backend["added_tokens"]}
    control = {id_ for id_, token in added.items() if token["special"]} | set(tokenizer.all_special_ids)
    alphabet = _byte_level_alphabet()
    out = []
    for id_, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if token is None or id_ in control:
            out.append(b"")
        elif id_ in added:
            out.append(token.encode())
        elif is_byte_level:
            # a token outside the alphabet stands for itself: tokenizers/src/pre_tokenizers/byte_level.rs, decode_chain
            is_spelt = all(character in alphabet for character in token)
            out.append(bytes(alphabet[character] for character in token) if is_spelt else token.encode())
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            out.append(bytes.fromhex(token[3:5]))  # byte fall-back
        else:
            out.append(token.replace("▁", " ").encode())
    return out


def differences_from_source(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """One sentence for each way in which text as tokenized may differ from the source; [] when it never does."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    is_byte_level = _is_byte_level(backend, tokenizer.name_or_path)
    normalizers = _parts(backend.get("normalizer"), "normalizers")
    pre_tokenizers = _parts(backend.get("pre_tokenizer"), "pretokenizers")
    metaspace = [part for part in (*normalizers, *pre_tokenizers) if part["type"] == "Metaspace"]
    sentences = []
    if (
        any(part["type"] == "Prepend" for part in normalizers)
        or any(part.get("prepend_scheme", "always") != "never" for part in metaspace)
        or any(part["type"] == "ByteLevel" and part.get("add_prefix_space") for part in pre_tokenizers)
    ):
        sentences.append("The tokenizer puts a space in front of a text: ranges count one byte more than the source.")
    if not is_byte_level:
        sentences.append("The tokenizer reads the character ▁ (U+2581) of a source as a space.")
        if not backend["model"].get("byte_fallback"):
            sentences.append("A character outside its vocabulary became one unknown token, which counts as 0 bytes.")
    others = sorted({part["type"] for part in normalizers} - {"Prepend", "Metaspace"} - _replaced_spaces(normalizers))
    if others:
        names = ", ".join(others)
        sentences.append(f"The tokenizer normalises text first ({names}): ranges count the bytes after that.")
    if any((token["lstrip"] or token["rstrip"]) and not token["special"] for token in backend["added_tokens"]):
        sentences.append("An added token of the tokenizer swallows the white space beside it.")
    return sentences


def _is_byte_level(backend: dict[str, Any], name: str) -> bool:
    """Byte-level BPE, or else SentencePiece-BPE; nothing else gives its text back."""
    decoder = json.dumps(backend.get("decoder"))
    is_byte_level = '"ByteLevel"' in decoder
    if not is_byte_level and "▁" not in decoder and '"\\u2581"' not in decoder:
        raise UserError(
            f"tokenizer {name!r} is neither byte-level BPE nor SentencePiece-BPE, so its bytes per token cannot be "
            "counted. Use a byte-level BPE, for example one that train-tokenizer makes."
        )
    return is_byte_level


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> the byte it stands for. Source: openai/gpt-2, src/encoder.py, bytes_to_unicode."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _parts(part: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer of tokenizer.json as a flat list."""
    if part is None:
        return []
    return [each for child in part[children] for each in _parts(child, children)] if children in part else [part]


def _replaced_spaces(normalizers: list[dict[str, Any]]) -> set[str]:
    """{"Replace"} where all that is replaced is a space by ▁, which its bytes take back."""
    replaced = [part for part in normalizers if part["type"] == "Replace"]
    is_spaces = all(part["content"] == "▁" and part["pattern"] == {"String": " "} for part in replaced)
    return {"Replace"} if is_spaces else set()
