"""How fast a disk is, past the kernel's cache."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from looptx_core.machine.facts import existing_parent

_BLOCK = 1 << 20  # bytes a request, as DeepSpeed's aio block


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes a second, by O_DIRECT in requests of 1 MiB, one at a time."""

    read: float
    write: float
    bytes: int


def disk_speed(folder: str | Path, size: int = 64 << 20, seconds: float = 2.0) -> DiskSpeed:
    """Write and read a file of `size` bytes, each for at most `seconds`.

    The file has no name where the system allows it, so nothing is left behind.
    Raises `OSError`: no O_DIRECT there (EINVAL), no space, no right to write.
    """
    parent = existing_parent(Path(folder))
    with tempfile.TemporaryFile(dir=parent) as file, mmap.mmap(-1, _BLOCK) as block:
        block.write(os.urandom(_BLOCK))  # random, as a disk may compress
        direct = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT)
        try:
            start, written = time.perf_counter(), 0
            while written < size and time.perf_counter() - start < seconds:
                written += os.pwrite(direct, block, written)
            os.fsync(direct)
            write = written / (time.perf_counter() - start)
            start, done = time.perf_counter(), 0
            while done < written and time.perf_counter() - start < seconds:
                done += os.preadv(direct, [block], done)
            read = done / (time.perf_counter() - start)
        finally:
            os.close(direct)
    return DiskSpeed(read, write, written)
