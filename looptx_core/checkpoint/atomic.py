"""Folders and files that appear whole or not at all: written under a temporary name beside their
place, brought to the disk, then renamed. What was there stays until then."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from looptx_core.errors import LooptxError, remedy
from looptx_core.outputs import put_in_place, temporary_beside

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling, then move it into place of what is there."""
    folder = folder.resolve()
    temporary = temporary_beside(folder)
    try:
        temporary.mkdir(parents=True)
        try:
            write(temporary)
            mode = temporary.stat().st_mode & 0o666
            for file in [*temporary.rglob("*"), temporary]:
                if file.is_file():  # as the umask has it: safetensors lets nobody else read
                    file.chmod(mode)
                _sync(file)
            put_in_place(temporary, folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error


def write_file(file: Path, content: str | bytes) -> None:
    """Put a text or bytes in place of what is there."""
    temporary = temporary_beside(file)
    try:
        if isinstance(content, str):
            temporary.write_text(content, "utf-8")
        else:
            temporary.write_bytes(content)
        _sync(temporary)
        temporary.replace(file)
        _sync(file.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(file, error) from error


def _sync(path: Path) -> None:
    """Bring a file, or a folder's entries, to the disk."""
    if os.name == "nt":  # its fsync takes no read-only handle
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(path: Path, error: Exception) -> LooptxError:
    """One line for a failed write; safetensors reports the system's error as text only."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := _OS_ERROR.search(str(error))):
        number = int(match[1])
    reason = os.strerror(number) if number else str(error).splitlines()[0]
    return LooptxError(f"cannot write {path}: {reason}; {remedy(number)}")
