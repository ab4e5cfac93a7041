"""Text to ids as nanoGPT's data/openwebtext/prepare.py does it: tiktoken in `datasets.map`, then one memory map.

    python nanogpt.py json|parquet FILES TOKENIZER OUT NUM_PROC

The vocabulary is that of TOKENIZER (a byte-level BPE), not GPT-2's, so that the ids are those of the others.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tiktoken
from datasets import load_dataset

kind, files, tokenizer, out, num_proc = sys.argv[1:]
out = Path(out)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def byte_of() -> dict[str, int]:
    """The byte behind each letter of a byte-level vocabulary (openai/gpt-2, src/encoder.py, bytes_to_unicode)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [number for number in range(256) if number not in plain]
    return {chr(number): number for number in plain} | {chr(256 + i): number for i, number in enumerate(others)}


def load_encoding() -> tiktoken.Encoding:
    raw = json.loads((Path(tokenizer) / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in raw["added_tokens"]}
    letters = byte_of()
    words = {word: number for word, number in raw["model"]["vocab"].items() if word not in special}
    ranks = {bytes(letters[letter] for letter in word): number for word, number in words.items()}
    return tiktoken.Encoding("own", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


encoding = load_encoding()
end = encoding.encode_single_token("[EOT]")


def process(example):
    ids = encoding.encode_ordinary(example["text"])
    ids.append(end)
    return {"ids": ids, "len": len(ids)}


raw = load_dataset(kind, data_files=files, split="train", cache_dir=str(out / "cache"))
tokenized = raw.map(process, remove_columns=raw.column_names, num_proc=int(num_proc))
length = np.sum(tokenized["len"], dtype=np.uint64)
ids = np.memmap(out / "train.bin", dtype=np.uint16, mode="w+", shape=(int(length),))
total_batches = min(1024, len(tokenized))
position = 0
for number in range(total_batches):
    batch = tokenized.shard(num_shards=total_batches, index=number, contiguous=True).with_format("numpy")
    joined = np.concatenate(batch["ids"])
    ids[position : position + len(joined)] = joined
    position += len(joined)
ids.flush()
