"""Swap files by plain reads and writes in threads, where DeepSpeed's libaio op can't be had.

DeepSpeed moves tensors to and from a disk by an object that its compiled op `async_io` makes.
`PlainFiles` has the methods of it that the swappers call, by Python's `os` alone.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from looptx_core.errors import LooptxError

SWAPPERS = ("partitioned_param_swapper", "partitioned_optimizer_swapper",
            "pipelined_optimizer_swapper")  # fmt: skip
_THREADS = 4
_PAGE = 4096
_SECTOR = 512  # bytes; what direct access needs of a length and of an address


class PlainFiles:
    """Moves whole buffers between memory and files, past the system's cache where it can.

    locked: where each buffer of `new_cpu_locked_tensor` begins and where it ends, of all handles
    of a run. The other arguments, which tune libaio, mean nothing here.
    """

    def __init__(self, locked: dict[int, int], **_: Any) -> None:
        self._locked = locked
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="looptx-swap")
        self._moving: list[tuple[str, Future[None]]] = []

    def async_pread(self, buffer: Tensor, path: str, offset: int = 0) -> int:
        """Begin to fill a buffer from a file."""
        return self._begin(os.O_RDONLY, buffer, path, offset)

    def async_pwrite(self, buffer: Tensor, path: str, offset: int = 0) -> int:
        """Begin to write a buffer; it must not change before `wait`."""
        return self._begin(os.O_WRONLY | os.O_CREAT, buffer, path, offset)

    def wait(self) -> int:
        """Finish what was begun; how many buffers. Raises `LooptxError` where one failed."""
        moving, self._moving = self._moving, []
        for path, future in moving:
            try:
                future.result()
            except OSError as error:
                raise LooptxError(
                    f"cannot swap to {path}: {error.strerror}; free some space, or choose another "
                    "folder to swap to"
                ) from error
        return len(moving)

    def new_cpu_locked_tensor(self, count: int, example: Tensor) -> Tensor:
        """(count,) of the example's type, at the beginning of a page."""
        size = count * example.element_size()
        memory = torch.empty(size + _PAGE, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        skipped = -memory.data_ptr() % _PAGE
        buffer = memory[skipped : skipped + size].view(example.dtype)
        self._locked[buffer.data_ptr()] = buffer.data_ptr() + size
        return buffer

    def free_cpu_locked_tensor(self, buffer: Tensor) -> bool:
        return self._locked.pop(buffer.data_ptr(), None) is not None

    def is_pinned(self, buffer: Tensor) -> bool:
        """Whether it is of `new_cpu_locked_tensor`, or a part of one."""
        begin = buffer.data_ptr()
        return any(first <= begin < last for first, last in self._locked.items())

    def _begin(self, flags: int, buffer: Tensor, path: str, offset: int) -> int:
        self._moving.append((path, self._threads.submit(_move, flags, buffer, path, offset)))
        return 0


def _move(flags: int, buffer: Tensor, path: str, offset: int) -> None:
    memory = buffer.detach().view(torch.uint8).numpy().data
    aligned = not (buffer.data_ptr() % _SECTOR or memory.nbytes % _SECTOR or offset % _SECTOR)
    if aligned:
        try:
            return _move_all(flags | os.O_DIRECT, memory, path, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return _move_all(flags, memory, path, offset)  # no direct access there, or to this memory


def _move_all(flags: int, memory: memoryview, path: str, offset: int) -> None:
    file = os.open(path, flags, 0o600)
    try:
        done = 0
        while done < memory.nbytes:
            rest = memory[done:]
            if flags & os.O_WRONLY:
                moved = os.pwrite(file, rest, offset + done)
            else:
                moved = os.preadv(file, [rest], offset + done)
            if not moved:
                raise OSError(errno.EIO, "the file is shorter than what was swapped")
            done += moved
    finally:
        os.close(file)


@contextlib.contextmanager
def plain_files() -> Iterator[None]:
    """Swappers that DeepSpeed makes in this context move by `PlainFiles`."""
    modules: list[Any] = [
        importlib.import_module(f"deepspeed.runtime.swap_tensor.{n}") for n in SWAPPERS
    ]
    builders = [module.AsyncIOBuilder for module in modules]
    op = SimpleNamespace(aio_handle=functools.partial(PlainFiles, {}))
    try:
        for module in modules:
            module.AsyncIOBuilder = lambda: SimpleNamespace(load=lambda **_: op)
        yield
    finally:
        for module, builder in zip(modules, builders):
            module.AsyncIOBuilder = builder
