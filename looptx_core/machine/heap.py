"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_USUAL = {_TRIM: 64 << 20, _MMAP: 32 << 20}  # where glibc's own adaptation ends
_KEEPING = {_TRIM: (1 << 31) - 1, _MMAP: 1 << 30}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, glibc keeps what is freed for the next tensor of a step, as an allocator of GPU
    memory does, instead of giving it back and having every page cleared anew.

    Nothing changes with another C library. At the end memory is given back.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "gnu_get_libc_version"):
        yield
        return
    for name, size in _KEEPING.items():
        library.mallopt(name, size)
    try:
        yield
    finally:
        for name, size in _USUAL.items():
            library.mallopt(name, size)
        library.malloc_trim(ctypes.c_size_t(0))
