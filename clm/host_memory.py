"""Freed memory goes back to the system while a model that no process holds whole gets its first weights.

glibc keeps freed blocks of up to 32 MB for later. Matrices that are made whole, one after another, between parts that
stay, leave holes which nothing fits into: under ZeRO stage 3 half as much again as the parts themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc, malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_SMALL_BYTES = 2**20
_LARGEST_BYTES = 2**25  # where glibc's own threshold ends, after it has seen blocks of that size


@contextlib.contextmanager
def freed_memory_goes_back() -> Iterator[None]:
    """Blocks of 1 MB and more are mapped one by one, and unmapped when they are freed. Nothing without glibc."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None:
        yield
        return
    set_option(_MMAP_THRESHOLD, _SMALL_BYTES)
    try:
        yield
    finally:  # as glibc would have it by now: what a step allocates again and again is kept
        set_option(_MMAP_THRESHOLD, _LARGEST_BYTES)
        set_option(_TRIM_THRESHOLD, 2 * _LARGEST_BYTES)
