"""A copy of a training's state in host memory, so that a checkpoint can be written while training goes on.

In: nests of dicts, lists and tuples with tensors. Out: the same nests, whose tensors are copies on the CPU; tensors
that share their memory (tied weights) still do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from data_prep.memory import available_memory
from data_prep.sizes import format_bytes

Buffers = dict[tuple, torch.Tensor]
MEMORY_SHARE = 0.8  # of what is available: the rest of the machine goes on


def copy_to_host(value: Any, buffers: Buffers) -> Any:
    """A copy of `value`.

    Args:
        value: numbers, texts and None are taken as they are, tensors are copied.
        buffers: {} at first; keeps the copies, and the next call copies into them: fresh memory costs several times
            the copying itself. What an earlier call returned changes with it.
    """
    return _copy(value, (), buffers, {})


def _copy(value: Any, key: tuple, buffers: Buffers, copies: dict[tuple, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            return value.detach().to("cpu", copy=True)  # a quantized optimizer's own kind knows how to copy itself
        same = _identity(value)
        if same not in copies:
            buffer = buffers.get(key)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = buffers[key] = torch.empty_like(value, device="cpu", requires_grad=False)
            copies[same] = buffer.copy_(value.detach())
        return copies[same]
    if isinstance(value, dict):
        return {name: _copy(child, (*key, name), buffers, copies) for name, child in value.items()}
    if isinstance(value, list | tuple) and any(isinstance(child, torch.Tensor | dict | list) for child in value):
        return type(value)(_copy(child, (*key, i), buffers, copies) for i, child in enumerate(value))
    return value


def num_bytes_to_copy(value: Any) -> int:
    """The memory that a copy takes."""
    return sum({_identity(tensor): tensor.nbytes for tensor in iter_tensors(value)}.values())


def iter_tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of a nest."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            yield from iter_tensors(child)


def _identity(tensor: torch.Tensor) -> tuple:
    """Equal for tensors that are the same memory seen in the same way."""
    if tensor.numel() == 0 or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def find_lack_of_memory(need_bytes: int) -> str | None:
    """Why there is no room for a copy, or None."""
    room = available_memory()
    if room is None or need_bytes <= MEMORY_SHARE * room:
        return None
    return f"its copy takes {format_bytes(need_bytes)} of memory, {format_bytes(room)} are available"
