"""Training a byte-level BPE tokenizer.

In: texts and a vocabulary size. Out: a tokenizer folder that `AutoTokenizer.from_pretrained(folder)` and
`tokenizers.Tokenizer.from_file(folder/tokenizer.json)` both load. The size is exact and counts the 256 bytes and the
control tokens. The tokenizer puts BOS in front of a text, as Llama's does, and never EOS: preparation writes that where
a document ends.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from data_prep.errors import UserError
from data_prep.merge_progress import shown_merges


@dataclass(frozen=True)
class ControlTokens:
    """The four tokens that stand for no text; their ids are 0 to 3."""

    bos: str = "[BOT]"
    eos: str = "[EOT]"
    pad: str = "[PAD]"
    unk: str = "[UNK]"


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path, control: ControlTokens) -> None:
    """Train and save.

    Raises:
        UserError: the texts hold too few different words to fill the vocabulary, or two control tokens are equal.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if len(set(astuple(control))) < 4 or not all(astuple(control)):
        raise UserError(
            f"train-tokenizer: the control tokens are {', '.join(astuple(control))} but must be four different words."
        )
    os.environ.pop(
        "TOKENIZERS_PARALLELISM", None
    )  # counting words uses all cores; workers are not forked, so nothing can hang
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    # Source: GPT-2's pre-tokenizer (openai/gpt-2, src/encoder.py), which use_regex=True applies.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(astuple(control)),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=True,
        progress_format="json",  # for data_prep/merge_progress.py
    )
    with shown_merges():
        tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size(with_added_tokens=True)
    if reached != vocab_size:
        raise UserError(
            f"train-tokenizer: the vocabulary size is {vocab_size:,} but the text yields only {reached:,} "
            "different tokens. "
            f"Nothing is written. Give more text, or a smaller size: --tokenizer train:{reached} "
            f"(train-tokenizer: --vocab-size {reached})."
        )
    bos = (control.bos, tokenizer.token_to_id(control.bos))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{control.bos} $A", pair=f"{control.bos} $A {control.bos} $B", special_tokens=[bos]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": control.bos,
        "eos_token": control.eos,
        "pad_token": control.pad,
        "unk_token": control.unk,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 10**30,  # transformers' way of saying: no limit of the tokenizer's own
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
