"""Text to blocks as transformers' examples/pytorch/language-modeling/run_clm.py does it: tokenize, group_texts.

    python run_clm.py json|parquet FILES TOKENIZER OUT NUM_PROC

run_clm.py adds no end of document, and drops the tail of each batch of 1,000 documents.
"""

import sys
from itertools import chain

from datasets import load_dataset
from transformers import AutoTokenizer

BLOCK_SIZE = 2048
kind, files, tokenizer, out, num_proc = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
raw = load_dataset(kind, data_files=files, split="train", cache_dir=out)


def tokenize(examples):
    return tokenizer(examples["text"])


def group_texts(examples):
    joined = {k: list(chain(*examples[k])) for k in examples}
    total = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
    result = {k: [t[i : i + BLOCK_SIZE] for i in range(0, total, BLOCK_SIZE)] for k, t in joined.items()}
    result["labels"] = result["input_ids"].copy()
    return result


tokenized = raw.map(tokenize, batched=True, num_proc=int(num_proc), remove_columns=raw.column_names)
blocks = tokenized.map(group_texts, batched=True, num_proc=int(num_proc))
blocks[0]
