"""The whole step that the parts of benchmarks/micro_parts.py are compared with, and the parts that need a whole model.

In: a `Shape`. Out: `Way`s of the parts optimizer and input, and the step itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.micro_parts import Shape, Way
from clm.attention import MASK_FREE, register_mask_free
from clm.dataset import TrainBlocks, as_inputs, collate
from clm.loss_only import install
from clm.mixed_precision import use_autocast_experts
from clm.muon import make_optimizer
from clm.order import Order, OrderSource, OrderStage
from data_prep.blocks import Blocks


def make_model(shape: Shape) -> Any:
    """The model as a run trains it."""
    from transformers import AutoModelForCausalLM

    register_mask_free()
    model = AutoModelForCausalLM.from_config(shape.config, attn_implementation=MASK_FREE, dtype=torch.float32)
    use_autocast_experts(model)
    install(model, "whole" if shape.is_compiled else "chunked")
    return model.to(shape.device).train()


def whole_step(shape: Shape, model: Any, dataset: Path) -> Way:
    """Reading, forward, backward, clipping and fused AdamW of one micro-batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    read = our_batches(shape, dataset)
    called = shape.compile(model) if shape.is_compiled else model
    is_cast = shape.dtype != torch.float32

    def run() -> None:
        batch = as_inputs(to_device(read(), shape), shape.block_size)
        with torch.autocast(shape.device.type, shape.dtype, enabled=is_cast):
            loss = called(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Way("step", "whole", run)


def optimizers(shape: Shape, model: Any) -> Iterator[Way]:
    """Clipping and one update of all parameters; their gradients are random and stay."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    parameters = list(model.parameters())

    def clip() -> Any:
        return torch.nn.utils.clip_grad_norm_(parameters, 1.0)

    yield Way("optimizer", "clip gradients", clip, is_used=True)
    yield Way("optimizer", "AdamW, fused", torch.optim.AdamW(parameters, lr=1e-6, fused=True).step, is_used=True)
    yield Way("optimizer", "AdamW, foreach", torch.optim.AdamW(parameters, lr=1e-6, foreach=True).step)
    for name, package, make in (
        ("AdamW 8-bit, bitsandbytes", "bitsandbytes", _bitsandbytes),
        ("AdamW 8-bit, torchao", "torchao", _torchao),
    ):
        if importlib.util.find_spec(package) is None:
            yield Way("optimizer", name, None, why_not=f"{package} is not installed")
        else:
            yield Way("optimizer", name, make(parameters).step)
    muon = {"learning_rate": 1e-6, "momentum": 0.95, "weight_decay": 0.0, "adjust": "original"}
    both = make_optimizer(model, {"lr": 1e-6, "fused": True}, 0.0, muon)
    yield Way("optimizer", "Muon + AdamW", both.step)


def _bitsandbytes(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-6)


def _torchao(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-6)


def casts(shape: Shape, model: Any) -> Iterator[Way]:
    """What autocast adds to a micro-step: each matrix to bf16, and its gradient back."""
    if shape.dtype == torch.float32:
        return
    matrices = [p.detach() for p in model.parameters() if p.dim() >= 2]
    gradients = [torch.zeros_like(p, dtype=shape.dtype) for p in matrices]

    def run() -> None:
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.to(shape.dtype)
            gradient.to(torch.float32)

    yield Way("cast", "weights to bf16, gradients to fp32", run, is_used=True)


def our_batches(shape: Shape, dataset: Path) -> Callable[[], dict[str, Any]]:
    """A function that reads the next micro-batch as a run does."""
    blocks = Blocks(dataset, "train")
    order = Order([OrderSource(blocks.num_blocks)], [OrderStage(None, (Fraction(1),))], 1)
    samples = shape.num_tokens // blocks.block_size
    train = TrainBlocks([blocks], order, shape.block_size, 2**40)
    position = 0

    def read() -> dict[str, Any]:
        nonlocal position
        batch = collate(train.__getitems__(list(range(position, position + samples))), with_labels=False)
        position += samples
        return batch

    return read


def to_device(batch: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """From pinned memory, without waiting."""
    if shape.device.type == "cpu":
        return batch
    return {name: tensor.pin_memory().to(shape.device, non_blocking=True) for name, tensor in batch.items()}


def inputs(shape: Shape, dataset: Path) -> Iterator[Way]:
    """A micro-batch from the disk: ours, and transformers' collation of Python lists that lie in memory already.

    On a GPU both run beside it; on a CPU they are part of the step.
    """
    from transformers import default_data_collator

    blocks, ours = Blocks(dataset, "train"), our_batches(shape, dataset)
    samples = shape.num_tokens // blocks.block_size
    rows = blocks.read(np.arange(samples) % blocks.num_blocks)[:, :-1].reshape(-1, shape.block_size).tolist()
    listed = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": list(row)} for row in rows]
    is_in_step = shape.device.type == "cpu"
    yield Way("input", "ours: memory map, order", ours, is_used=is_in_step)
    yield Way("input", "stock: collation of Python lists", lambda: default_data_collator(listed))
    if not is_in_step:
        batch = ours()
        yield Way("input", "pin and copy to the GPU", lambda: to_device(batch, shape))
