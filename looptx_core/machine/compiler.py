"""The C++ compiler and the libraries that kernels are built with."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_PROGRAM = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
_AIO = "#include <libaio.h>\nint main() { io_context_t c = 0; return io_setup(1, &c); }\n"


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command, its first line of --version, and what it can't do."""

    command: str
    version: str
    obstacle: str | None
    """One line on why it builds nothing; None: it does."""


def compiler_words() -> list[str]:
    """The command of the C++ compiler that torch builds with, as words: $CXX, else c++."""
    return shlex.split(os.environ.get("CXX", "c++"))


def compiler() -> Compiler:
    """The compiler that torch builds with: $CXX, else c++; tried on a program with OpenMP."""
    command = os.environ.get("CXX", "c++")
    words = shlex.split(command)
    if not words or shutil.which(words[0]) is None:
        return Compiler(command, "", f"no {command} on PATH; install g++ (Debian: apt install g++)")
    told = subprocess.run([*words, "--version"], capture_output=True, text=True)
    version = told.stdout.splitlines()[0] if told.stdout else ""
    return Compiler(command, version, try_to_build(_PROGRAM, "-fopenmp"))


def libaio_obstacle() -> str | None:
    """Why nothing can be built with libaio, in one line; None: it can."""
    wrong = try_to_build(_AIO, "-laio")
    if wrong is None or "no c++" in wrong:
        return wrong
    return "libaio's header or library is missing; apt install libaio-dev (Fedora: libaio-devel)"


def ninja_obstacle() -> str | None:
    """Why torch can't build extensions for want of ninja; None: it is there."""
    if shutil.which("ninja") is None:
        return "no ninja on PATH; pip install ninja"
    return None


def try_to_build(source: str, *flags: str) -> str | None:
    """Compile and link a C++ program, without running it; the first line of what went wrong."""
    words = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "try.cpp"
        file.write_text(source, "ascii")
        # A user's own folders of headers and libraries, as DeepSpeed's builder reads them.
        extra = [word for name in ("CFLAGS", "LDFLAGS")
                 for word in shlex.split(os.environ.get(name, ""))]  # fmt: skip
        command = [*words, str(file), "-o", str(Path(folder) / "try"), *extra, *flags]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"no c++ compiler that runs: {error}"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if "error" in line] or ["it failed"]
    return f"{words[0]} can't build: {lines[0].strip()}"
