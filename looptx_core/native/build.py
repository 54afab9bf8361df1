"""The kernel's shared library: compiled once for this machine and kept in the user's cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from looptx_core.errors import MissingError
from looptx_core.machine.compiler import compiler_words

_BUILDING = threading.Lock()
_SOURCE = Path(__file__).with_name("decode.cpp")
# Sums may be taken in any order, as vector units do; -ffast-math would also set the whole
# process's rounding of tiny numbers.
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread",
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
    "-freciprocal-math", "-ffinite-math-only",
)  # fmt: skip


def library_path() -> Path:
    """Where the library of this source, these flags and this processor stands."""
    recipe = _SOURCE.read_bytes() + "\0".join((*_FLAGS, platform.machine(), _processor())).encode()
    digest = hashlib.sha256(recipe).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "looptx" / f"decode-{digest}.so"


def build_ahead() -> None:
    """Compile beside what else has to be done first, such as importing torch."""

    def quietly() -> None:
        with contextlib.suppress(MissingError):  # whoever needs it will be told
            build()

    threading.Thread(target=quietly, daemon=True).start()


def build() -> Path:
    """Compile where it was not done before, some seconds. Raises `MissingError`."""
    with _BUILDING:
        return _build(library_path())


def _build(path: Path) -> Path:
    if path.exists():
        return path
    command = compiler_words()
    if not command or shutil.which(command[0]) is None:
        raise MissingError(
            f"no {' '.join(command)} to compile it; install g++ (Debian: apt install g++)"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may build the same: each writes its own, and a rename is atomic.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            subprocess.run(
                [*command, *_FLAGS, str(_SOURCE), "-o", str(made)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            made.replace(path)
    except subprocess.CalledProcessError as error:
        reason = next((line for line in error.stderr.splitlines() if "error" in line), "it failed")
        raise MissingError(f"{command[0]} could not compile it: {reason}") from error
    except OSError as error:
        raise MissingError(f"it can't be kept in {path.parent}: {error}") from error
    return path


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded kernel. Raises `MissingError`."""
    path = build()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingError(f"{path}: the decoding kernel can't be loaded ({error})") from error
    loaded.looptx_new.restype = ctypes.c_void_p
    return loaded


def _processor() -> str:
    """What tells one processor's instructions from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()
