"""The parts of a training step, each in the variants that one can choose from, as functions that do one of them once.

In: a `Shape`: a model's config, T and the rows of a micro-batch. Out: `Way`s. A way that the run takes is `is_used`:
those together, each times its `count` in a step, are what the step is made of.

Inputs are random; forward and backward are done where both belong to a step. FLOPs are those of the mathematics: a
causal attention counts half of the square, and what a kernel computes twice counts once.
"""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Way:
    """One variant of one part; `run` does it once, or `why_not` says why it cannot be done here."""

    part: str
    variant: str
    run: Callable[[], Any] | None
    count: int = 1  # in a step
    flops: float | None = None  # of one
    is_used: bool = False
    why_not: str | None = None


@dataclass(frozen=True)
class Shape:
    """A model, a micro-batch and how it is computed."""

    config: PretrainedConfig
    path: str
    rows: int
    block_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products
    is_compiled: bool

    @property
    def num_tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.block_size

    @property
    def head_size(self) -> int:
        """Of one attention head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def random(self, *size: int, dtype: torch.dtype | None = None, grad: bool = True) -> torch.Tensor:
        """A random tensor."""
        return torch.randn(*size, device=self.device, dtype=dtype or self.dtype).requires_grad_(grad)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile with one shape, as a run does it."""
        return torch.compile(function, dynamic=False)


def there_and_back(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], Any]:
    """Forward, and backward to all inputs that have gradients."""
    by = [each for each in inputs if each.requires_grad]
    gradient: torch.Tensor | None = None

    def run() -> Any:
        nonlocal gradient
        output = function(*inputs)
        if gradient is None:
            gradient = torch.randn_like(output)
        return torch.autograd.grad(output, by, gradient)

    return run


def gemms(shape: Shape) -> Iterator[Way]:
    """The products of the blocks, and of the head, which `losses` has again: forward and both of backward."""
    c, n, size = shape.config, shape.num_tokens, shape.head_size
    layers, experts = c.num_hidden_layers, getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None)
    heads, keys = c.num_attention_heads * size, (c.num_key_value_heads or c.num_attention_heads) * size
    matrices = [("q and o", c.hidden_size, heads, 2), ("k and v", c.hidden_size, keys, 2)]
    if not experts:
        matrices += [("gate and up", c.hidden_size, c.intermediate_size, 2)]
        matrices += [("down", c.intermediate_size, c.hidden_size, 1)]
    matrices += [("head", c.hidden_size, c.vocab_size, 1)]
    for name, fan_in, fan_out, times in matrices:
        x, w, dy = (shape.random(*s, grad=False) for s in ((n, fan_in), (fan_out, fan_in), (n, fan_out)))

        def run(x: torch.Tensor = x, w: torch.Tensor = w, dy: torch.Tensor = dy) -> None:
            torch.mm(x, w.T)
            torch.mm(dy, w)
            torch.mm(dy.T, x)

        count = times * (1 if name == "head" else layers)
        yield Way("gemm", f"{name} {fan_in} x {fan_out}", run, count, 6.0 * n * fan_in * fan_out, name != "head")
    if not experts:
        return
    each = n * c.num_experts_per_tok // experts  # tokens of an expert, as if the router dealt them out evenly
    for name, fan_in, fan_out, times in (
        ("experts' gate and up", c.hidden_size, c.intermediate_size, 2),
        ("experts' down", c.intermediate_size, c.hidden_size, 1),
    ):
        sizes = ((experts, each, fan_in), (experts, fan_in, fan_out), (experts, each, fan_out))
        x, w, dy = (shape.random(*s, grad=False) for s in sizes)

        def run(x: torch.Tensor = x, w: torch.Tensor = w, dy: torch.Tensor = dy) -> None:
            torch.bmm(x, w)
            torch.bmm(dy, w.mT)
            torch.bmm(x.mT, dy)

        flops = 6.0 * experts * each * fan_in * fan_out
        yield Way("gemm", f"{name} {experts} x {fan_in} x {fan_out}", run, times * layers, flops, True)


def attentions(shape: Shape) -> Iterator[Way]:
    """Attention of one layer by transformers' own functions, and PyTorch's kernels by name where there is a GPU."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    c, t, size = shape.config, shape.block_size, shape.head_size
    heads, keys = c.num_attention_heads, c.num_key_value_heads or c.num_attention_heads
    q, k, v = (shape.random(shape.rows, each, t, size) for each in (heads, keys, keys))
    module = types.SimpleNamespace(num_key_value_groups=heads // keys, is_causal=True, training=True, layer_idx=0)
    flops, count = 6.0 * heads * size * t * shape.num_tokens, c.num_hidden_layers

    def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa_attention_forward(module, q, k, v, None)[0]

    mask = torch.ones(t, t, dtype=torch.bool, device=shape.device).tril()[None, None].expand(shape.rows, 1, t, t)

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa_attention_forward(module, q, k, v, mask)[0]

    yield Way("attention", "sdpa_causal: no mask", there_and_back(causal, q, k, v), count, flops, True)
    yield Way("attention", "dense mask: stock, compiled", there_and_back(masked, q, k, v), count, flops)
    if shape.device.type != "cuda":
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    gradient = torch.randn_like(causal(q, k, v))
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def run(backend: SDPBackend = backend) -> Any:
            with sdpa_kernel(backend):
                return torch.autograd.grad(causal(q, k, v), (q, k, v), gradient)

        yield Way("attention", f"no mask, {backend.name.lower()}", run, count, flops)
    yield _flex(shape, q, k, v, flops, count)
    if importlib.util.find_spec("flash_attn") is None:
        yield Way("attention", "flash_attention_2", None, why_not="flash-attn is not installed")
        return
    from flash_attn import flash_attn_func

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attn_func(*(part.transpose(1, 2) for part in (q, k, v)), causal=True)

    yield Way("attention", "flash_attention_2", there_and_back(flash, q, k, v), count, flops)


def _flex(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flops: float, count: int) -> Way:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    t = shape.block_size
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, t, t, device=shape.device)
    flex = shape.compile(flex_attention)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flex(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return Way("attention", "flex_attention, compiled", there_and_back(run, q, k, v), count, flops)


def losses(shape: Shape) -> Iterator[Way]:
    """Head and cross entropy of a micro-batch, forward and backward, from the last hidden states."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    from clm.loss_only import CHUNK_ROWS, CHUNK_ROWS_GPU, ChunkedLoss

    c, n = shape.config, shape.num_tokens
    hidden = shape.random(n, c.hidden_size)
    weight = torch.nn.Parameter(torch.randn(c.vocab_size, c.hidden_size, device=shape.device) * 0.02)
    targets = torch.randint(c.vocab_size, (n,), device=shape.device)
    flops = 6.0 * n * c.hidden_size * c.vocab_size
    is_cast = shape.dtype != torch.float32
    chunk_rows = CHUNK_ROWS_GPU if shape.device.type == "cuda" else CHUNK_ROWS

    def stock(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden, weight)
        # what transformers computes, and the copy of the logits that accelerate returns
        return ForCausalLMLoss(logits, None, c.vocab_size, shift_labels=targets), logits.float()

    def whole(hidden: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")

    def chunked(hidden: torch.Tensor) -> torch.Tensor:
        return ChunkedLoss.apply(hidden, weight, None, targets, chunk_rows)

    def way(name: str, function: Callable[[torch.Tensor], Any], is_used: bool = False) -> Way:
        def run() -> Any:
            with torch.autocast(shape.device.type, shape.dtype, enabled=is_cast):
                found = function(hidden)
            loss = found[0] if isinstance(found, tuple) else found
            return torch.autograd.grad(loss, (hidden, weight))

        return Way("loss", name, run, 1, flops, is_used)

    yield way("stock: logits returned", stock)
    yield way("whole", whole)
    yield way("chunked", chunked, not shape.is_compiled)
    if shape.is_compiled:
        yield way("stock, compiled", shape.compile(stock))
        yield way("whole, compiled", shape.compile(whole), True)
    if hasattr(F, "linear_cross_entropy"):

        def torchs(hidden: torch.Tensor) -> torch.Tensor:
            return F.linear_cross_entropy(hidden, weight.to(hidden.dtype), targets, reduction="sum")

        yield way("torch's linear_cross_entropy", torchs)
    else:
        yield Way("loss", "torch's linear_cross_entropy", None, why_not=f"torch {torch.__version__} has none")
    if importlib.util.find_spec("liger_kernel") is None or shape.device.type != "cuda":
        why = "liger-kernel needs a GPU" if shape.device.type != "cuda" else "liger-kernel is not installed"
        yield Way("loss", "Liger", None, why_not=why)
        return
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    yield way("Liger", lambda h: liger(weight, h, targets))


def elementwise(shape: Shape) -> Iterator[Way]:
    """What lies between the products: embedding, norms, rotation, gates and sums, compiled or not."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    c, b, t = shape.config, shape.rows, shape.block_size
    layers, size, stream = c.num_hidden_layers, shape.head_size, torch.float32  # the residual stream stays fp32
    table = torch.nn.Embedding(c.vocab_size, c.hidden_size, device=shape.device)
    ids = torch.randint(c.vocab_size, (b, t), device=shape.device)
    gradient = torch.randn(b, t, c.hidden_size, device=shape.device)

    def embed() -> Any:
        return torch.autograd.grad(table(ids), table.weight, gradient)

    yield Way("elementwise", "embedding", embed, 1, is_used=True)
    norm = LlamaRMSNorm(c.hidden_size).to(shape.device)
    x, other = (shape.random(b, t, c.hidden_size, dtype=stream) for _ in range(2))
    heads = (c.num_attention_heads, c.num_key_value_heads or c.num_attention_heads)
    q, k = (shape.random(b, each, t, size) for each in heads)
    cos, sin = (shape.random(1, t, size, dtype=stream, grad=False) for _ in range(2))
    per_token = getattr(c, "num_experts_per_tok", 1) if hasattr(c, "num_local_experts") else 1
    gate, up = (shape.random(b * per_token, t, c.intermediate_size) for _ in range(2))

    def rotate(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.cat([each.flatten() for each in apply_rotary_pos_emb(q, k, cos, sin)])

    for name, count, function, inputs in (
        ("RMSNorm", 2 * layers + 1, lambda x: norm(x).to(shape.dtype), (x,)),
        ("rotation of q and k", layers, rotate, (q, k)),
        ("silu(gate) x up", layers, lambda gate, up: F.silu(gate) * up, (gate, up)),
        ("residual sum", 2 * layers, lambda x, y: x + y, (x, other)),
    ):
        yield Way("elementwise", name, there_and_back(function, *inputs), count, is_used=not shape.is_compiled)
        if shape.is_compiled:
            run = there_and_back(shape.compile(function), *inputs)
            yield Way("elementwise", f"{name}, compiled", run, count, is_used=True)
