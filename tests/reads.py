"""Counts what would make a GPU's queue run dry: values of tensors that the host looks at, and copies that it waits for.

On a CPU nothing ever waits, so what is counted is the call: `.item()`, `bool(tensor)`, `float(tensor)`, `.tolist()`,
`.numpy()`, `.cpu()`, and `.to()` of a device without non_blocking.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Reads(TorchDispatchMode):
    """While entered, notes each read with the line of Python that asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    @property
    def num_reads(self) -> int:
        """How many."""
        return len(self.places)

    def note(self, may_be_in_model: bool = True) -> None:
        """One more read, from here; models and torch also "move" tensors to where they are already."""
        stack = [frame for frame in traceback.extract_stack() if "reads.py" not in frame.filename]
        if not may_be_in_model and stack[-1].filename.endswith("clip_grad.py"):
            return
        frames = [frame for frame in stack if "/torch/" not in frame.filename]
        if not may_be_in_model and "/transformers/m" in frames[-1].filename:
            return
        self.places.append(f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}")

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.note()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def count_reads() -> Iterator[Reads]:
    """`with count_reads() as reads: ...; reads.num_reads`."""
    reads = Reads()

    def noting(name):
        real = getattr(torch.Tensor, name)

        def call(self, *args, **kwargs):
            if name != "to" or (_names_device(args, kwargs) and not kwargs.get("non_blocking")):
                reads.note(may_be_in_model=name != "to")
            return real(self, *args, **kwargs)

        return mock.patch.object(torch.Tensor, name, call)

    with reads, contextlib.ExitStack() as stack:
        for name in ("tolist", "numpy", "cpu", "to"):
            stack.enter_context(noting(name))
        yield reads


def _names_device(args, kwargs) -> bool:
    return "device" in kwargs or any(isinstance(a, str | torch.device) for a in args)
