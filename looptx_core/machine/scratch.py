"""Cache folders, and temporary folders that are removed even after a process was killed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX, _LOCK = "looptx-", ".lock"


def user_cache() -> Path:
    """looptx's folder in the user's cache folder; where there is no home, one for this user in
    the folder for temporary files."""
    homes = [os.environ.get("XDG_CACHE_HOME", "")]
    with contextlib.suppress(RuntimeError):  # no HOME, and a user that the system does not know
        homes.append(str(Path.home() / ".cache"))
    for home in homes:
        if home and Path(home).is_absolute() and _may_write(Path(home)):
            return Path(home) / "looptx"
    own = Path(tempfile.gettempdir()) / f"cache-of-looptx-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        own.mkdir(mode=0o700)
    return own


def cache_folder() -> Path:
    """Where derived files are kept: `$LOOPTX_CACHE`, else looptx in the user's cache folder."""
    if own := os.environ.get("LOOPTX_CACHE"):
        return Path(own)
    return user_cache()


def is_ours(path: Path) -> bool:
    """Whether nobody but this user, or the system's, can have written to a file or folder."""
    facts = path.resolve().stat()
    return facts.st_uid in (os.getuid(), 0) and not facts.st_mode & 0o022


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder for a `with` block; those of killed processes are removed first.

    parent: where to make it; by default the system's folder for temporary files.
    """
    parent = parent or Path(tempfile.gettempdir())
    remove_stale(parent)
    folder, handle = parent / f"{_PREFIX}{secrets.token_hex(8)}", None
    try:  # from before it is made, so that a signal just then leaves nothing
        folder.mkdir(mode=0o700)
        handle = _lock(folder, create=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def remove_stale(parent: Path) -> None:
    """Remove scratch folders of this user whose process is gone."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            facts = folder.lstat()
            if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
                continue
            if not (folder / _LOCK).exists():
                continue
            handle = _lock(folder, create=False)
            if handle is not None:  # else its process lives
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)


def _lock(folder: Path, create: bool) -> int | None:
    """A handle that holds the folder's lock as long as this process lives, None where another
    has it."""
    import fcntl

    handle = os.open(folder / _LOCK, os.O_RDWR | (os.O_CREAT if create else 0))
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _may_write(folder: Path) -> bool:
    """Whether files can be made there, or the folder itself."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK)
