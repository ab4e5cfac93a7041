"""A prepared dataset for benchmarks: random letters and a made-up vocabulary of any size, by the real `data_prep prep`.

In: a vocabulary size and a block size. Out: data that a recipe can name. What the text is makes no difference to speed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.paths import cache_dir

NUM_BYTES = 2_000_000


def dataset_of(vocab_size: int, block_size: int, has_validation: bool = False) -> Path:
    """The folder of the dataset, prepared at the first call on this machine; on request with a tenth for validation."""
    named = f"letters-{vocab_size}-{block_size}{'-validation' if has_validation else ''}"
    folder = cache_dir() / "benchmarks" / named
    if not (folder / "manifest.json").is_file():
        _prepare(folder, vocab_size, block_size, has_validation)
    return folder


def _prepare(folder: Path, vocab_size: int, block_size: int, has_validation: bool) -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    from data_prep.__main__ import main as data_prep

    controls = ["[EOT]", "[PAD]"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: vocab_size - len(letters) - len(controls)]
    vocabulary = {token: i for i, token in enumerate([*controls, *letters, *(a + b for a, b in pairs)])}
    assert len(vocabulary) == vocab_size, "pairs of bytes make up to 65,794 tokens"
    tokenizer = Tokenizer(BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    beside = folder.with_name(f"{folder.name}-source")
    beside.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOT]", pad_token="[PAD]")
    fast.save_pretrained(beside / "tokenizer")
    random = np.random.default_rng(0)
    text = bytes(random.integers(97, 123, NUM_BYTES, dtype=np.uint8)).decode()
    lines = [text[i : i + 60] for i in range(0, len(text), 60)]
    source, fraction = beside / "text", 0.1 if has_validation else 0  # of documents, which are files
    source.mkdir(exist_ok=True)
    num_files = 50 if has_validation else 1
    for number in range(num_files):
        text = "\n".join(lines[number::num_files])
        (source / f"letters-{number}.txt").write_text(text, encoding="utf-8")
    options = ["--tokenizer", beside / "tokenizer", "--block-size", block_size]
    options += ["--val-fraction", fraction, "--num-proc", 1]
    code = data_prep(["prep", str(source), *map(str, options), "--out", str(folder)])
    assert code == 0
