"""A plain GPT: learned positions, LayerNorm, one QKV matrix, GELU; the block that most hand-written loops train.

In: a Llama config whose matrices are to be matched in number. Out: a model of nearly as many of them, of its width,
depth, vocabulary and T: the feed-forward width makes up the difference, in steps of 64.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm."""

    def __init__(self, width: int, num_heads: int, inner: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, width) in and out."""
        b, t, width = x.shape
        heads = (part.view(b, t, self.num_heads, -1).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    """Embeddings and blocks; `head` is tied to the token embedding."""

    def __init__(self, vocab_size: int, width: int, num_layers: int, num_heads: int, inner: int, block_size: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, inner) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) ids to (B, T, width)."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def make_gpt(config_path: str, block_size: int) -> Gpt:
    """A Gpt with as many parameters in its blocks as the Llama config, to 1 % at the sizes of model_configs/."""
    config = json.loads(Path(config_path).read_text(encoding="utf-8"))
    assert "num_local_experts" not in config, "a plain GPT has no experts"
    width, heads = config["hidden_size"], config["num_attention_heads"]
    key_values = config["num_key_value_heads"] * (config.get("head_dim") or width // heads)
    per_layer = 2 * width * width + 2 * width * key_values + 3 * width * config["intermediate_size"]
    inner = max(64, round((per_layer - 4 * width * width) / (2 * width) / 64) * 64)
    torch.manual_seed(0)
    model = Gpt(config["vocab_size"], width, config["num_hidden_layers"], heads, inner, block_size)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    return model
