"""Where a run swaps to: a folder of its own on a real disk, gone when the run is.

<path>/looptx-<id>/       what DeepSpeed writes
<path>/looptx-<id>.lock   held by the run's first process on this machine; by it a later start
                          tells what a crash left behind from what another run is using
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import mmap
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looptx_core.config.processes import machine
from looptx_core.errors import LooptxError, UsageError
from looptx_core.machine.facts import filesystem, is_memory

_PAGE = 4096


@dataclass
class Traffic:
    """Bytes moved by this process."""

    written: int = 0
    read: int = 0


class SwapFolder:
    """A run's place under `path`.

    run: the run's folder, by which all its processes find the same place. Raises `UsageError` for
    a path that does not exist (other than the run's own `swap`), is in memory, does not allow
    direct access, which libaio needs, or is in use by this run already; `LooptxError` where it
    lacks `needed` bytes.

    by_libaio: whether DeepSpeed's own op swaps here, else `plain_files`.
    """

    def __init__(
        self, path: Path | None, run: Path, needed: int = 0, by_libaio: bool = True
    ) -> None:
        self.parent = path or run / "swap"
        digest = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]
        name = f"looptx-{digest}-{machine()}"  # machines may see the same folder
        self.folder, self._lock = self.parent / name, self.parent / (name + ".lock")
        self._own_parent = path is None
        check_swap_folder(path, run)
        self.needed, self.by_libaio = needed, by_libaio
        self._held: int | None = None

    def open(self) -> None:
        """Clear what crashes left, check the place and take it; by one process of a machine."""
        if self._own_parent:
            self.parent.mkdir(parents=True, exist_ok=True)
        refuse_memory(self.parent)
        clear_stale(self.parent)
        self._held = _hold(self._lock)
        if self._held is None:
            raise UsageError(
                f"{self.folder} is in use by another process of this run; wait for its end"
            )
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            if self.by_libaio:
                _check_direct(self.folder)
            free = shutil.disk_usage(self.parent).free
            if free < self.needed:
                raise LooptxError(
                    f"{self.parent} has {free / 1e9:.1f} GB free, and swapping takes "
                    f"{self.needed / 1e9:.1f} GB; free some space or choose another `nvme_path`"
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove what was swapped."""
        if self._held is None:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.unlink(missing_ok=True)
        os.close(self._held)
        self._held = None
        if self._own_parent:
            with contextlib.suppress(OSError):  # another run may swap here too
                self.parent.rmdir()

    def files(self) -> list[Path]:
        """The swap files that are there now."""
        return sorted(self.folder.rglob("*.swp"))


def clear_stale(parent: Path) -> list[Path]:
    """Remove the folders under `parent` whose runs are gone, and return them."""
    gone = []
    for folder in parent.glob("looptx-*"):
        if not folder.is_dir():
            continue
        lock = folder.with_name(folder.name + ".lock")
        held = _hold(lock)
        if held is not None:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)
            os.close(held)
            gone.append(folder)
    return gone


def check_swap_folder(path: Path | None, run: Path) -> None:
    """Raise `UsageError` where a run can't swap to `path`, or without one to its own folder."""
    if path is not None and not path.is_dir():
        raise UsageError(f"`nvme_path` {path}: no such folder; make it, or choose another")
    refuse_memory(path or run)


def refuse_memory(path: Path) -> None:
    """Raise `UsageError` where `path` is in memory: swapping there would save none."""
    kind = filesystem(path)
    if is_memory(kind):
        raise UsageError(
            f"`nvme_path` {path} is in memory ({kind}), where swapping saves nothing; "
            "give a folder on a disk"
        )


def count_traffic() -> Traffic:
    """Count what DeepSpeed moves between memory and disk in this process from now on."""
    traffic = Traffic()
    modules = [
        importlib.import_module("deepspeed.runtime.swap_tensor." + name)
        for name in ("utils", "optimizer_utils", "async_swapper", "partitioned_param_swapper",
                     "partitioned_optimizer_swapper", "pipelined_optimizer_swapper")
    ]  # fmt: skip
    for name, field in (("swap_in_tensors", "read"), ("swap_out_tensors", "written")):
        plain = getattr(modules[0], name)
        plain = getattr(plain, "plain", plain)

        def counted(
            handle: Any, buffers: Any, paths: Any, *, plain: Any = plain, field: str = field
        ) -> Any:
            moved = sum(buffer.numel() * buffer.element_size() for buffer in buffers)
            setattr(traffic, field, getattr(traffic, field) + moved)
            return plain(handle, buffers, paths)

        counted.plain = plain  # type: ignore[attr-defined]
        for module in modules:
            if hasattr(module, name):
                setattr(module, name, counted)
    return traffic


def _hold(lock: Path) -> int | None:
    """An open file that holds the lock, or None where another process does."""
    file = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def _check_direct(folder: Path) -> None:
    """Write a page past the system's cache, as DeepSpeed will."""
    probe = folder / "probe"
    try:
        file = os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
        try:
            with mmap.mmap(-1, _PAGE) as page:
                os.write(file, page)
        finally:
            os.close(file)
    except OSError as error:
        raise UsageError(
            f"`nvme_path` {folder.parent}: cannot write there directly ({error.strerror}); give a "
            "folder on a local disk"
        ) from error
    finally:
        probe.unlink(missing_ok=True)
