"""What the C library does with freed memory: kept for the next micro-batch, or given back while first weights are made.

glibc alone is told so; other C libraries, and a process that is told otherwise by MALLOC_..., are left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc, malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Let this process use freed arrays of up to 32 MB again.

    glibc gives each back to the kernel, and the next micro-batch, which is as large, costs a page fault per 4 KB: more
    time than reading it takes. Up to 512 MB of freed memory stay with the process.
    """
    _set_option(_MMAP_THRESHOLD, 2**25)  # at its largest
    _set_option(_TRIM_THRESHOLD, 2**29)


@contextlib.contextmanager
def freed_memory_goes_back() -> Iterator[None]:
    """Blocks of 1 MB and more are mapped one by one, and unmapped when they are freed; afterwards they are kept.

    For first weights that no process holds whole: matrices are made whole, one after another, between parts that stay.
    Kept for later, they leave holes that nothing fits into, as large in all as the parts under ZeRO stage 3.
    """
    _set_option(_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        keep_freed_memory()


def _set_option(option: int, value: int) -> None:
    if not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(AttributeError, OSError, TypeError):  # there is no mallopt
            ctypes.CDLL(None).mallopt(option, value)
