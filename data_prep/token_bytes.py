"""The UTF-8 bytes that each token id stands for: what turns a loss per token into bits per byte, and ids into text.

In: a Hugging Face tokenizer. Out: the bytes of every id, or their number. The bytes of a document's tokens, joined, are
its text exactly as it was tokenized; `backend_differences` says where that is not the text of the source (for
SentencePiece-BPE, the one space that its normaliser puts in front).
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


def token_byte_lengths(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """UTF-8 bytes of each id, control tokens 0: int64 (len(tokenizer),).

    Raises:
        UserError: a tokenizer that is neither byte-level nor SentencePiece-BPE: its tokens do not give the text back.
    """
    control, name = set(tokenizer.all_special_ids), tokenizer.name_or_path
    table = backend_token_bytes(tokenizer.backend_tokenizer, control, len(tokenizer), name)
    return np.array([len(each) for each in table], dtype=np.int64)


def backend_token_bytes(backend: "Tokenizer", control: set[int], num_ids: int, name: str) -> list[bytes]:
    """The bytes of each id, empty for control tokens and for holes in the vocabulary.

    A token may be a part of a character: only the bytes of a whole document are sure to be UTF-8.

    Args:
        control: ids that stand for no text, beside those that the tokenizer marks special.
        name: of the tokenizer, for messages.
    Raises:
        UserError: as token_byte_lengths.
    """
    raw = json.loads(backend.to_str())
    is_byte_level = _is_byte_level(raw, name)
    added = {token["id"]: token for token in raw["added_tokens"]}
    control = control | {id_ for id_, token in added.items() if token["special"]}
    alphabet = byte_level_alphabet()
    out = []
    for id_ in range(num_ids):
        token = backend.id_to_token(id_)
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


def backend_differences(backend: "Tokenizer", name: str) -> list[str]:
    """One sentence for each way in which text as tokenized may differ from the source; [] when it never does.

    Args:
        name: of the tokenizer, for messages.
    Raises:
        UserError: as token_byte_lengths.
    """
    raw = json.loads(backend.to_str())
    is_byte_level = _is_byte_level(raw, name)
    normalizers = _parts(raw.get("normalizer"), "normalizers")
    pre_tokenizers = _parts(raw.get("pre_tokenizer"), "pretokenizers")
    plain = [token for token in raw["added_tokens"] if not token["special"]]
    sentences = [*_spaces_in_front(normalizers, pre_tokenizers, bool(plain))]
    known = {"Prepend", "Metaspace", "ByteLevel"} | _replaced_spaces(normalizers)
    if not is_byte_level:
        sentences.append("The tokenizer reads the character ▁ (U+2581) of a source as a space.")
        if not raw["model"].get("byte_fallback"):
            sentences.append("A character outside its vocabulary became one unknown token, which counts as 0 bytes.")
    elif any(backend.token_to_id(character) is None for character in byte_level_alphabet()):
        sentences.append("The tokenizer has no token for some bytes: they are left out, or unknown and count as 0.")
    others = sorted({part["type"] for part in normalizers} - known)
    if others:
        names = ", ".join(others)
        sentences.append(f"The tokenizer normalises text first ({names}): ranges count the bytes after that.")
    removing = sorted({part["type"] for part in pre_tokenizers if _removes(part)})
    if removing:
        sentences.append(f"The tokenizer leaves out what it splits text at ({', '.join(removing)}).")
    if any(token["lstrip"] or token["rstrip"] for token in plain):
        sentences.append("An added token of the tokenizer swallows the white space beside it.")
    return sentences


def _spaces_in_front(
    normalizers: list[dict[str, Any]], pre_tokenizers: list[dict[str, Any]], is_cut: bool
) -> list[str]:
    """The sentence on a space that is put in front of a text, if one is.

    Args:
        is_cut: added tokens cut a text into pieces, each of which gets its space.
    """
    metaspace = [part.get("prepend_scheme", "always") for part in (*normalizers, *pre_tokenizers)
                 if part["type"] == "Metaspace"]  # fmt: skip
    is_always = any(part["type"] == "Prepend" for part in normalizers)
    is_where_none = any(scheme != "never" for scheme in metaspace) or any(
        part["type"] == "ByteLevel" and part.get("add_prefix_space") for part in pre_tokenizers
    )
    if not is_always and not is_where_none:
        return []
    text = "a text" if is_always else "a text that begins with none"
    behind = ", and behind each added token," if is_cut and (is_always or set(metaspace) != {"first"}) else ""
    return [f"The tokenizer puts a space in front of {text}{behind}: ranges count one byte more than the source."]


def _removes(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer drops what it splits at, so that no token holds it."""
    kinds = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")
    return pre_tokenizer["type"] in kinds or pre_tokenizer.get("behavior") == "Removed"


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


def byte_level_alphabet() -> dict[str, int]:
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
