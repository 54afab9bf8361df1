"""Run commands of looptx in forks of a process that has imported everything, with limits.

A fork starts in milliseconds where a new process would import for seconds, and a crash, a hang or
a process that takes all memory ends the fork alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pkgutil
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_ADDRESSES = 24 << 30
"""Bytes of address space that a fork may take beyond its parent's, a last fence."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | None
    """Its exit code; None where it was ended by a signal, of the system or of `run`."""
    signal: int
    """The signal that ended it, else 0."""
    ended_for: str
    """'time' or 'memory' where it broke that limit and was ended, else ''."""
    out: str
    err: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """The largest resident size of it or of one of its processes."""


def prepare() -> None:
    """Import whatever a command may import. Forks only: no thread may have been started."""
    from looptx_cli.main import COMMANDS, load_command

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with contextlib.redirect_stderr(None), Path(os.devnull).open("w") as null:
        saved = os.dup(2)
        os.dup2(null.fileno(), 2)  # bitsandbytes writes there what it lacks
        try:
            for command in COMMANDS:
                load_command(command)
            _import_all("looptx_core")
            for name in ("typer._adapters", "pydantic"):
                with contextlib.suppress(ImportError):  # of some versions of Typer
                    importlib.import_module(name)
        finally:
            os.dup2(saved, 2)
            os.close(saved)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page
    assert threading.active_count() == 1, "a thread would be lost in every fork"


def _import_all(package: str) -> None:
    folder = importlib.import_module(package).__path__
    for module in pkgutil.walk_packages(folder, f"{package}."):
        # An export's own module is for transformers, and DeepSpeed starts much by itself.
        if not any(part in module.name for part in ("deepspeed", "modeling_looptx")):
            with contextlib.suppress(ModuleNotFoundError):  # of an extra
                importlib.import_module(module.name)


def run(
    arguments: Sequence[str],
    folder: Path,
    *,
    seconds: float,
    most_bytes: int,
    stdin: bytes = b"",
    environment: dict[str, str] | None = None,
    first: Callable[[], object] = lambda: None,
    kill_after: float | None = None,
    program: Callable[[list[str]], int] | None = None,
) -> Outcome:
    """Run `looptx ARGUMENTS` in a folder, and wait for it.

    Args:
        program: what to run instead of looptx.
        seconds, most_bytes: wall time, and resident memory of each process, after which the
            command and all that it started are ended.
        first: called in the fork before the command, to break something there.
        kill_after: send SIGKILL to the command alone, not to what it started, after so many
            seconds of wall time.
    """
    logs = [folder / ".out", folder / ".err"]
    began = time.monotonic()
    parent = os.getpid()
    process = os.fork()
    if not process:
        _child(parent, arguments, folder, logs, stdin, environment or {}, first, program)
    peak, ended_for, pause = 0, "", 0.002
    while True:
        done, status, usage = os.wait4(process, os.WNOHANG)
        if done:
            break
        elapsed = time.monotonic() - began
        peak = max([peak, *map(_resident, [process, *_below(process)])])
        if kill_after is not None and elapsed >= kill_after:
            os.kill(process, signal.SIGKILL)
        elif peak > most_bytes or elapsed > seconds:
            ended_for = "memory" if peak > most_bytes else "time"
            os.killpg(process, signal.SIGKILL)
        time.sleep(pause if kill_after is None else min(pause, 0.002))
        pause = min(0.05, pause * 1.5)
    with contextlib.suppress(ProcessLookupError):
        if kill_after is None:  # a killed command's workers have to notice by themselves
            os.killpg(process, signal.SIGKILL)
    out, err = (log.read_bytes().decode("utf-8", "backslashreplace") for log in logs)
    for log in logs:
        log.unlink()
    signalled = os.WIFSIGNALED(status)
    return Outcome(
        code=None if signalled else os.WEXITSTATUS(status),
        signal=os.WTERMSIG(status) if signalled else 0,
        ended_for=ended_for,
        out=out,
        err=err,
        seconds=time.monotonic() - began,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=max(peak, usage.ru_maxrss * 1024),
    )


def _child(
    parent: int,
    arguments: Sequence[str],
    folder: Path,
    logs: list[Path],
    stdin: bytes,
    environment: dict[str, str],
    first: Callable[[], object],
    program: Callable[[list[str]], int] | None,
) -> None:
    """The fork: streams, limits, the command, the end. Never returns."""
    code = 99
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that call
            os._exit(code)
        os.chdir(folder)
        os.environ.update(environment)
        for number, log in enumerate(logs, 1):
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
            os.dup2(handle, number)
            os.close(handle)
        _feed(stdin)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + _ADDRESSES, size + _ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        first()
        from looptx_cli.main import main

        code = (program or main)(list(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _feed(stdin: bytes) -> None:
    """Make these bytes the standard input, from a file without a name."""
    handle = os.memfd_create("stdin")
    os.write(handle, stdin)
    os.lseek(handle, 0, os.SEEK_SET)
    os.dup2(handle, 0)
    os.close(handle)


def _below(process: int) -> list[int]:
    """The processes that a process started, at any depth."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    return [child for one in map(int, text.split()) for child in (one, *_below(one))]


def _resident(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(text) * os.sysconf("SC_PAGE_SIZE")
