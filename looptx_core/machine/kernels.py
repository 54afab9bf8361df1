"""Small C++ kernels: compiled once for this machine, and kept in the user's cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import threading
from pathlib import Path

from looptx_core.errors import MissingError
from looptx_core.machine.compiler import compiler_words
from looptx_core.machine.scratch import is_ours, scratch_folder, user_cache

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
    """Start compiling in the background, for example while torch is imported.

    False if the library exists already.
    """

    def quietly() -> None:
        with contextlib.suppress(MissingError):  # `load` raises it again
            build(source, *more)

    if _is_sound(library_path(source, *more)):
        return False
    threading.Thread(target=quietly, daemon=True).start()
    return True


def library_path(source: Path, *more: str) -> Path:
    """The path of the library for this file and the headers beside it, these flags, this compiler
    and this processor."""
    files = [source, *sorted(source.parent.glob("*.h"))]
    texts = (file.read_text("utf-8") for file in files)
    recipe = "\0".join((*texts, *compiler_words(), *_FLAGS, *more, _processor()))
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    return user_cache() / f"{source.stem}-{digest}.so"


def _is_sound(path: Path) -> bool:
    """Whether a library is complete and only this user can write to it, as loading it runs it."""
    try:
        wanted = path.with_suffix(".sha256").read_text("ascii").strip()
        if not (is_ours(path) and is_ours(path.parent)):
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == wanted
    except (OSError, UnicodeDecodeError):
        return False


def build(source: Path, *more: str) -> Path:
    """The path of the library, which is compiled if needed. Raises `MissingError`."""
    words, path = compiler_words(), library_path(source, *more)
    try:
        with _BUILDING:
            if _is_sound(path):
                return path
            if not words or shutil.which(words[0]) is None:
                raise MissingError(f"no C++ compiler ({' '.join(words) or '$CXX is empty'})")
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not is_ours(path.parent):
                path.parent.chmod(0o700)  # refused where it is another user's
            # Others may build the same: each in a folder of its own, and a rename is atomic.
            with scratch_folder(path.parent) as folder:
                made = folder / path.name
                command = [*words, *_FLAGS, *more, str(source), "-o", str(made)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                made.chmod(0o700)
                with made.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                digest_file = made.with_suffix(".sha256")
                digest_file.write_text(digest + "\n", "ascii")
                digest_file.replace(path.with_suffix(".sha256"))
                made.replace(path)
        return path
    except subprocess.CalledProcessError as error:
        reason = next((line for line in error.stderr.splitlines() if "error" in line), "it failed")
        raise MissingError(f"{words[0]} can't build {source.name}: {reason}") from error
    except OSError as error:
        raise MissingError(f"{path} can't be kept: {error}") from error


def _processor() -> str:
    """The processor's instruction sets, as a string."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.machine() + platform.processor()
