"""How many UTF-8 bytes each token id stands for: what turns a loss per token into bits per byte.

In: a Hugging Face tokenizer. Out: one integer per id. Summed over the tokens of a text they give the text's length in
bytes (for SentencePiece-BPE plus the one space that its normaliser puts in front of a text).
"""

import json
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def token_byte_lengths(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """UTF-8 bytes of each id, control tokens 0: int64 (len(tokenizer),).

    Raises:
        UserError: a tokenizer that is neither byte-level nor SentencePiece-BPE: its tokens do not give the text back.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    decoder = json.dumps(backend.get("decoder"))
    is_byte_level = '"ByteLevel"' in decoder
    if not is_byte_level and "▁" not in decoder and '"\\u2581"' not in decoder:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} is neither byte-level BPE nor SentencePiece-BPE, so its "
            "bytes per token "
            "cannot be counted. Use a byte-level BPE, for example one that train-tokenizer makes."
        )
    added = {token["id"]: token for token in backend["added_tokens"]}
    control = {id_ for id_, token in added.items() if token["special"]} | set(tokenizer.all_special_ids)
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    for id_, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if token is None or id_ in control:
            continue  # a hole in the vocabulary, or a token that stands for no text
        if id_ in added:
            lengths[id_] = len(token.encode())
        elif is_byte_level:
            lengths[id_] = len(token)  # one character of the alphabet per byte
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            lengths[id_] = 1  # byte fall-back
        else:
            lengths[id_] = len(token.replace("▁", " ").encode())
    return lengths
