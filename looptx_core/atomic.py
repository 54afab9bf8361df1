"""Files and folders that appear whole or not at all.

Each is written under a temporary name beside its place, brought to the disk, then renamed; what
was there stays until then. A temporary name holds the machine and the process that writes it, so
that what a killed writer left is told from what another one is writing.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import socket
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from looptx_core.errors import LooptxError, remedy

_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.(tmp|old)")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of `file` when the block ends.

    After an exception `file` is as it was, and the temporary one is gone.

    Raises:
        OSError: it can't be written.
    """
    temporary = temporary_beside(file)
    try:
        yield temporary
        to_disk(temporary)
        temporary.replace(file)
        to_disk(file.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(file: Path, content: str | bytes, *, parents: bool = False) -> None:
    """Write a text, as UTF-8, or bytes in place of what is there.

    Args:
        parents: make the folders that it stands in, where they are not there.
    Raises:
        LooptxError: it can't be written; what was there is intact.
    """
    try:
        if parents:
            file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise _unwritable(file, error) from error


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then put it in place of what is there.

    Raises:
        LooptxError: it can't be written; what was there is intact.
    """
    folder = folder.resolve()
    try:
        temporary = temporary_beside(folder)
        temporary.mkdir(parents=True)
        try:
            write(temporary)
            mode = temporary.stat().st_mode & 0o666
            for file in [*temporary.rglob("*"), temporary]:
                if file.is_file():  # as the umask has it: safetensors lets nobody else read
                    file.chmod(mode)
                to_disk(file)
            put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except SafetensorError as error:
        raise _unwritable(folder, as_os_error(error)) from error
    except OSError as error:
        raise _unwritable(folder, error) from error


def put_in_place(new: Path, target: Path) -> None:
    """Rename a finished folder to `target`; what was there is removed only once it is there.

    Raises:
        OSError: it can't be renamed; what was there is back in its place.
    """
    old = _own_name(target, "old")
    try:
        target.rename(old)
    except FileNotFoundError:
        new.rename(target)
        to_disk(target.parent)
        return
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def temporary_beside(target: Path) -> Path:
    """A name beside `target` that no other writer uses; see `finish_replacement` too."""
    finish_replacement(target)
    return _own_name(target, "tmp")


def finish_replacement(target: Path) -> None:
    """Clear up what writers of `target` that were killed left beside it.

    Where one was killed between the renames of `put_in_place`, the former folder is put back.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.*"):
        # A name such as .y.new.<writer>.old is another target's.
        own = left.name.removeprefix(f".{target.name}")
        if own.count(".") != 2 or not is_temporary(f".y{own}") or not _writer_is_gone(left):
            continue
        if left.suffix == ".old" and not os.path.lexists(target):
            left.rename(target)
        else:
            _remove(left)


def remove_partial(folder: Path) -> None:
    """Remove what killed writers left in a folder that only this process writes to."""
    for path in folder.glob(".*"):
        if is_temporary(path.name):
            _remove(path)


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that a writer of this module makes."""
    return _TEMPORARY.fullmatch(name) is not None


def to_disk(path: Path) -> None:
    """Bring a file, or a folder's entries, to the disk. Raises `OSError`."""
    if os.name == "nt":  # its fsync takes no read-only handle
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # which file it was is known here only
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def as_os_error(error: SafetensorError) -> OSError:
    """The system's error that safetensors reports as a text only, or one without a number."""
    if match := _OS_ERROR.search(str(error)):
        number = int(match[1])
        return OSError(number, os.strerror(number))
    return OSError(str(error))


def _is_running(process: int) -> bool:
    """Whether a process of this machine runs, by its number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _own_name(target: Path, end: str) -> Path:
    own = f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return target.with_name(f".{target.name}.{own}.{end}")


def _machine() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _writer_is_gone(path: Path) -> bool:
    """Whether a temporary name is of a process of this machine that has ended."""
    found = _TEMPORARY.fullmatch(path.name)
    return found is not None and found[1] == _machine() and not _is_running(int(found[2]))


def _unwritable(path: Path, error: OSError) -> LooptxError:
    reason = error.strerror or (str(error) or type(error).__name__).splitlines()[0]
    return LooptxError(f"cannot write {path}: {reason}; {remedy(error)}")
