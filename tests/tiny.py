"""The tiny Llama of the tests: its shape, its config file, the model itself, and documents for it."""

from __future__ import annotations

import numpy as np

EOS = 1
SHAPE = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **SHAPE,
    "tie_word_embeddings": True,
    "attention_dropout": 0.1,  # so that a wrong random state after a resume shows
}


def make_model(attention: str = "sdpa", kind: type | None = None, **other: int):
    """The model with weights of seed 0, far from uniform; `kind` is another class than LlamaForCausalLM, `other` than
    SHAPE."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, **other}, initializer_range=0.2, use_cache=False)  # no cache: as Trainer sets it
    model = (kind or LlamaForCausalLM)(config).eval()
    model.config._attn_implementation = attention  # also one whose package is not installed here
    return model


def make_mixtral():
    """A mixture of four experts of the same shape, in training mode, with weights of seed 0."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    more = {"num_local_experts": 4, "initializer_range": 0.1, "use_cache": False, "tie_word_embeddings": False}
    return MixtralForCausalLM(MixtralConfig(**SHAPE, **more))


def make_stream(num_tokens: int, seed: int = 0) -> np.ndarray:
    """Documents of 0 to 24 tokens and their EOS, cut at num_tokens."""
    random = np.random.default_rng(seed)
    documents = [np.append(random.integers(2, 384, random.integers(0, 25)), EOS) for _ in range(num_tokens)]
    return np.concatenate(documents)[:num_tokens]
