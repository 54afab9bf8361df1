"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

KEPT_BLOCK = 1 << 30
"""Bytes of the largest block that is kept."""
_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_USUAL_TRIM, _USUAL_MMAP = 64 << 20, 32 << 20  # where glibc's own adaptation ends
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, glibc keeps what is freed for the next tensor of a step, as an allocator of GPU
    memory does, instead of giving it back and having every page cleared anew.

    Nothing changes with another C library, or where the user has set glibc's allocator by its
    environment. At the end memory is given back.
    """
    library = ctypes.CDLL(None)
    glibc = hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version")
    if not glibc or any(name in os.environ for name in _OWN):
        yield
        return
    # Old versions refuse more than 32 MiB; without this one set, the other would freeze it low.
    if library.mallopt(_MMAP, KEPT_BLOCK) or library.mallopt(_MMAP, _USUAL_MMAP):
        library.mallopt(_TRIM, (1 << 31) - 1)
    try:
        yield
    finally:
        library.mallopt(_MMAP, _USUAL_MMAP)
        library.mallopt(_TRIM, _USUAL_TRIM)
        library.malloc_trim(ctypes.c_size_t(0))
