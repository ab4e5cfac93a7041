"""litgpt's model class with the shape of one of our configs, where litgpt is installed.

In: a Llama config file. Out: litgpt's GPT, (B, T) ids to (B, T, V) logits. Its requirements hold back huggingface_hub,
so beside this project it is installed without them: pip install --no-deps litgpt lightning lightning-utilities
torchmetrics pytorch-lightning jsonargparse.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def make_litgpt(config_path: str, block_size: int) -> Any:
    """The model, fp32, weights from normal(0, initializer_range)."""
    from litgpt import GPT, Config

    config = json.loads(Path(config_path).read_text(encoding="utf-8"))
    assert config["model_type"] == "llama", "litgpt is compared at Llama's shape"
    shape = Config(
        name=Path(config_path).stem,
        block_size=block_size,
        vocab_size=config["vocab_size"],
        padded_vocab_size=config["vocab_size"],
        n_layer=config["num_hidden_layers"],
        n_head=config["num_attention_heads"],
        n_query_groups=config["num_key_value_heads"],
        n_embd=config["hidden_size"],
        head_size=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=config["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        intermediate_size=config["intermediate_size"],
        rope_base=int(config["rope_parameters"]["rope_theta"]),
    )
    torch.manual_seed(0)
    model = GPT(shape)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=config.get("initializer_range", 0.02))
    if config.get("tie_word_embeddings"):
        model.lm_head.weight = model.transformer.wte.weight
    return model
