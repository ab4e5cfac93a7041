"""A sharded checkpoint -> a model in Hub format, on one machine and without the processes that wrote it.

In: runs/<name>/checkpoint-<step> with `sharded/`. Out: *.safetensors with config, generation config and tokenizer, in
`weights-<step>` (run.retention) or in `.unsharded/checkpoint-<step>` for a command that asks for the model. The whole
model is in memory meanwhile.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from clm.checkpoint import UNSHARDED
from clm.sharded import SHARDED, is_sharded, read_model_state


def write_weights(checkpoint: Path, folder: Path) -> list[str]:
    """Write the weights of a sharded checkpoint as *.safetensors into a folder, and return the files' names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    before = set(os.listdir(folder)) if folder.exists() else set()
    config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # its class; the weights are the state's
    state = read_model_state(checkpoint)
    model.save_pretrained(folder, state_dict=state)
    return sorted(name for name in os.listdir(folder) if name not in before and "safetensors" in name)


def model_of_shards(checkpoint: Path) -> Path:
    """A folder with the model of a sharded checkpoint, made at the first call and kept while the checkpoint is.

    Raises:
        OSError: it cannot be written.
    """
    folder = checkpoint.parent / UNSHARDED / checkpoint.name
    if not is_sharded(checkpoint) or folder.is_dir():
        return folder if folder.is_dir() else checkpoint
    print(f"{checkpoint}: its shards are put together as a model in {folder}", flush=True)
    temporary = folder.with_name(f".new-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(checkpoint, temporary, ignore=shutil.ignore_patterns(SHARDED, "rng_state*", "checkpoint.json"))
    write_weights(checkpoint, temporary)
    os.rename(temporary, folder)
    return folder
