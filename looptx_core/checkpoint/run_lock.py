"""One writer a run: a lock in the run's folder, which ends with its process, however that ends."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from looptx_core.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows, where nothing locks
    fcntl = None  # type: ignore[assignment]

FILE = "run.lock"


class RunLock:
    """The right to write to a run's folder, from `acquire` to `release`.

    A record lock of POSIX: children don't inherit it, and a killed process loses it, so that a
    lock file without one is stale.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self._handle: int | None = None

    def acquire(self, report: Callable[[str], object] = lambda line: None) -> None:
        """Take the lock. report: told of a stale one.

        Raises `UsageError` where another process holds it.
        """
        while self._handle is None:
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if fcntl is not None:
                    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(handle, self.file):  # else its last owner removed it meanwhile
                    self._handle = handle
            except BlockingIOError as error:
                raise UsageError(
                    f"{self.file.parent}: {_owner(handle)} is writing this run; wait for it, or "
                    "choose another `out`"
                ) from error
            except OSError:
                self._handle = handle  # a file system without locks
            finally:
                if self._handle is None:
                    os.close(handle)
        if os.fstat(self._handle).st_size:
            report(f"lock: taken over from {_owner(self._handle)}, which is gone")
        os.ftruncate(self._handle, 0)
        text = json.dumps({"process": os.getpid(), "machine": socket.gethostname()})
        os.pwrite(self._handle, text.encode(), 0)

    def release(self) -> None:
        """Give it back, if it is held."""
        if self._handle is None:
            return
        self.file.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = None


def refuse_if_running(folder: Path) -> None:
    """Raise `UsageError` where a process is writing the run in a folder."""
    if (folder / FILE).is_file():
        lock = RunLock(folder)
        lock.acquire()
        lock.release()


def _same_file(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _owner(handle: int) -> str:
    try:
        found = json.loads(os.pread(handle, 1000, 0))
        return f"process {int(found['process'])} of {str(found['machine'])[:80]!r}"
    except (ValueError, KeyError, TypeError):
        return "another process"
