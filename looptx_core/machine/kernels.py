"""Small C++ kernels: compiled once for this machine, and kept in the user's cache."""

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
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", "-fopenmp-simd",
    "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip


@functools.cache
def load(source: Path, *more: str) -> ctypes.CDLL:
    """The library of a C++ file, compiled at its first use here, some seconds. more: flags.

    Raises `MissingError` where there is no compiler, or it can't build or keep the file.
    """
    path = build(source, *more)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingError(f"{path} can't be loaded: {error}") from error


def build_ahead(source: Path, *more: str) -> bool:
    """Begin to compile beside what else has to be done first, such as importing torch.

    False where it was done before.
    """

    def quietly() -> None:
        with contextlib.suppress(MissingError):  # who needs it will be told
            build(source, *more)

    if library_path(source, *more).exists():
        return False
    threading.Thread(target=quietly, daemon=True).start()
    return True


def library_path(source: Path, *more: str) -> Path:
    """Where the library of this file, these flags, this compiler and processor stands."""
    recipe = "\0".join((source.read_text("utf-8"), *compiler_words(), *_FLAGS, *more, _processor()))
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "looptx" / f"{source.stem}-{digest}.so"


def build(source: Path, *more: str) -> Path:
    """Where the library stands, compiled if need be. Raises `MissingError`."""
    words, path = compiler_words(), library_path(source, *more)
    try:
        with _BUILDING:
            if path.exists():
                return path
            if not words or shutil.which(words[0]) is None:
                raise MissingError(f"no C++ compiler ({' '.join(words) or '$CXX is empty'})")
            path.parent.mkdir(parents=True, exist_ok=True)
            # Others may build the same: each in a folder of its own, and a rename is atomic.
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                made = Path(folder) / path.name
                command = [*words, *_FLAGS, *more, str(source), "-o", str(made)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                made.replace(path)
        return path
    except subprocess.CalledProcessError as error:
        reason = next((line for line in error.stderr.splitlines() if "error" in line), "it failed")
        raise MissingError(f"{words[0]} can't build {source.name}: {reason}") from error
    except OSError as error:
        raise MissingError(f"{path} can't be kept: {error}") from error


def _processor() -> str:
    """What tells one processor's instructions from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.machine() + platform.processor()
