"""Text to MDS shards as llm-foundry's scripts/data_prep/convert_dataset_hf.py does it with --concat_tokens 2048.

    python llm_foundry.py json|parquet FILES TOKENIZER OUT NUM_PROC

One process writes; rows come from a DataLoader with NUM_PROC workers where there are as many files.
"""

import importlib
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
from datasets import load_dataset
from transformers import AutoTokenizer

try:
    importlib.import_module("torchvision")
except (ImportError, RuntimeError):  # no build for this torch; streaming imports it for pictures
    sys.modules |= {name: MagicMock() for name in ("torchvision", "torchvision.datasets", "torchvision.transforms")}
    sys.modules["torchvision.transforms.functional"] = MagicMock()
    sys.modules["torchvision.datasets"].VisionDataset = type("VisionDataset", (), {})
from streaming import MDSWriter

BLOCK_SIZE = 2048
kind, files, tokenizer, out, num_proc = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
raw = load_dataset(kind, data_files=files, split="train", streaming=True)
eos = [tokenizer.eos_token_id]


def iter_blocks():
    """llmfoundry/data/data.py, ConcatTokensDataset.__iter__."""
    buffer = []
    for sample in raw:
        buffer += (
            tokenizer(sample["text"], truncation=False, padding=False, add_special_tokens=False)["input_ids"] + eos
        )
        while len(buffer) >= BLOCK_SIZE:
            yield {"tokens": np.asarray(buffer[:BLOCK_SIZE], dtype=np.int32)}
            buffer = buffer[BLOCK_SIZE:]


with MDSWriter(columns={"tokens": "ndarray:int32"}, out=str(Path(out) / "mds"), compression=None) as writer:
    for block in iter_blocks():
        writer.write(block)
