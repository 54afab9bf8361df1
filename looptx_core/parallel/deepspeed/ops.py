"""DeepSpeed's compiled ops: which are built, building one ahead, and locks left by dead builds.

torch builds an extension in a folder of its own (`<cache>/py311_cpu/cpu_adam`) under a file named
`lock`. A build that was killed leaves it behind, and every later build waits for it for ever.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from looptx_core.errors import LooptxError, MissingError
from looptx_core.machine.compiler import compiler, libaio_obstacle, ninja_obstacle
from looptx_core.machine.facts import filesystem, is_shared
from looptx_core.parallel.deepspeed.library import version_obstacle

OPS = {
    "pin_memory": "memory that disks read into, for `offload` nvme",
    "async_io": "tensors to and from disk, for `offload` nvme",
    "cpu_adam": "AdamW in RAM, for `offload` cpu and nvme",
    "deepspeed_shm_comm": "sums over the processes of one machine, for `devices` above 1 on CPUs",
}
"""Names as DeepSpeed's, in the order in which they are built, with what each is for."""

# Runs in a process of its own: DeepSpeed writes to stdout, and a compiler's crash stays outside.
# A background job of a shell hands on that it ignores interrupts.
_INTERRUPTIBLE = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
_BUILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell's job started us
from deepspeed.ops.op_builder.all_ops import ALL_OPS
if sys.argv[1] not in ALL_OPS:
    sys.exit(f"looptx: this DeepSpeed has no op {sys.argv[1]}")
ALL_OPS[sys.argv[1]].load(verbose=True)
"""

TRIAL = """
import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.all_ops import ALL_OPS
found = {"version": deepspeed.__version__, "ops": sorted(ALL_OPS),
         "detail": f"on the accelerator '{get_accelerator()._name}'"}
"""
"""A program that imports DeepSpeed, for `looptx doctor`."""

State = Literal["built", "out of date", "not built", "being built", "stale lock"]


@dataclass(frozen=True)
class Op:
    """An op and the state of its build."""

    name: str
    purpose: str
    state: State
    folder: str


def op_folder(name: str) -> Path:
    """Where torch builds an extension of this name and keeps it."""
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        cuda = torch.version.cuda
        kind = f"cu{cuda.replace('.', '')}" if cuda else "cpu"
        if torch.version.hip is not None:
            kind = f"rocm{torch.version.hip.replace('.', '')}"
        python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
        root = str(Path(get_default_build_root()) / f"{python}_{kind}")
    return Path(root) / name


def inspect_op(name: str) -> Op:
    """The state of an op's build; nothing is built and nothing imported from DeepSpeed."""
    folder = op_folder(name)
    state: State
    if (folder / "lock").exists():
        state = "being built" if lock_holders(folder) else "stale lock"
    else:
        library = folder / f"{name}.so"
        if not library.is_file():
            state = "not built"
        elif library.stat().st_mtime < _installed_at():
            state = "out of date"  # ninja builds it again, as headers are newer
        else:
            state = "built"
    return Op(name, OPS.get(name, ""), state, str(folder))


def _installed_at() -> float:
    """When torch or DeepSpeed was installed, the later one; 0 where neither is."""
    times = [0.0]
    for package, file in (("torch", "version.py"), ("deepspeed", "git_version_info.py")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            path = Path(next(iter(spec.submodule_search_locations))) / file
            times.append(path.stat().st_mtime if path.is_file() else 0.0)
    return max(times)


def lock_holders(folder: Path) -> list[int]:
    """Processes that build in `folder`: they hold its lock open, or work in it as ninja does."""
    holders = []
    folder = folder.resolve()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            at_work = (process / "cwd").readlink() == folder
            opened = any(f.readlink() == folder / "lock" for f in (process / "fd").iterdir())
        except OSError:  # it ended meanwhile, or is another user's
            continue
        if at_work or opened:
            holders.append(int(process.name))
    return holders


def remove_stale_lock(name: str) -> str | None:
    """Remove a lock that no live process holds, and say so in one line; None: there is none.

    A lock on a network's file system may be another machine's, so it stays, and the line says
    what to delete.
    """
    lock = op_folder(name) / "lock"
    try:
        found = lock.stat()
        if lock_holders(lock.parent):
            return None
        time.sleep(1.0)  # a builder that just ended closes its lock before it removes it
        if lock.stat().st_ino != found.st_ino or lock_holders(lock.parent):
            return None
        if not Path("/proc/self/fd").is_dir() or is_shared(filesystem(lock.parent)):
            return (
                f"{name}: {lock} may be left from a killed build, or belong to another machine; "
                "delete it if nothing builds"
            )
        lock.unlink()
    except FileNotFoundError:
        return None
    minutes = (time.time() - found.st_mtime) / 60
    return f"{name}: removed {lock}, left by a build that was killed {minutes:.0f} minutes ago"


def op_obstacle(name: str) -> str | None:
    """Why an op can't be built here, in one line; None: it can."""
    if wrong := version_obstacle():
        return wrong
    if name == "async_io" and (wrong := libaio_obstacle()):
        return wrong
    return compiler().obstacle or ninja_obstacle()


def build_op(
    name: str,
    report: Callable[[str], object] = lambda line: None,
    every: float = 10.0,
) -> float:
    """Build one of DeepSpeed's ops into torch's cache; the seconds that it took.

    Already built, it takes what DeepSpeed's import does. A stale lock is removed first; a live
    build is waited for. report: called with lines of progress, at least each `every` seconds.
    Raises `MissingError` without a compiler, ninja or library, `LooptxError` where it fails.
    """
    if obstacle := op_obstacle(name):
        raise MissingError(f"{name}: {obstacle}")
    prefer_own_ninja()
    begun = time.monotonic()
    while True:
        _free(name, report)
        holders = lock_holders(op_folder(name))
        if not holders:
            break
        report(f"{name}: process {holders[0]} is building it, waiting")
        _wait_for(op_folder(name), every)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _INTERRUPTIBLE + _BUILD, name],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=_environment(),
            start_new_session=True,
        )  # fmt: skip
        try:
            _show_progress(child, output.fileno(), name, begun, report, every)
        finally:
            if child.poll() is None:
                _stop(child)
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise LooptxError(f"{name} was not built: {_reason(text)}; looptx doctor says what is here")
    seconds = time.monotonic() - begun
    report(f"{name}: ready after {seconds:.0f} s")
    return seconds


def prefer_own_ninja() -> None:
    """Put this Python's folder of programs first on PATH, for this process.

    Each version of ninja has its own idea of a command's hash: a build that another version made
    is built anew, for minutes, at its first use. So the one beside Python does all of them.
    """
    own = str(Path(sys.executable).parent)
    paths = os.environ.get("PATH", "").split(os.pathsep)
    if paths[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, *paths])


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a build: torch removes its lock on an interrupt, and ninja what is half done."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGINT)
    try:
        child.wait(20)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _free(name: str, report: Callable[[str], object]) -> None:
    """Remove stale locks of an op and of what it loads first."""
    for each in ("pin_memory", name) if name == "async_io" else (name,):
        if line := remove_stale_lock(each):
            report(line)


def _wait_for(folder: Path, seconds: float) -> None:
    """Until the build in `folder` ends, or `seconds` have passed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and (folder / "lock").exists():
        time.sleep(0.2)


def _environment() -> dict[str, str]:
    """This process's, with DeepSpeed on the CPU where there is no GPU."""
    import torch

    kind = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    return {**kind, **os.environ, "PYTHONUNBUFFERED": "1"}


def _show_progress(
    child: subprocess.Popen[bytes],
    output: int,
    name: str,
    begun: float,
    report: Callable[[str], object],
    every: float,
) -> None:
    """Report ninja's count of files until the child ends."""
    said = checked = time.monotonic()
    progress = shown = "at work"
    at = 0
    while child.poll() is None:
        time.sleep(0.2)
        new = os.pread(output, 1 << 20, at)
        at += len(new)
        for done, total in re.findall(rb"^\[(\d+)/(\d+)\]", new, re.MULTILINE):
            progress = f"{int(done)} of {int(total)} steps done"
        now = time.monotonic()
        if now - checked >= every:  # another build may have begun meanwhile, and been killed
            checked = now
            _free(name, report)
        if progress != shown or now - said >= every:
            said, shown = now, progress
            report(f"{name}: {progress}, {said - begun:.0f} s")


def _reason(text: str) -> str:
    """The line of a failed build that tells most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line.removeprefix("looptx: ") for line in lines if line.startswith("looptx: ")]
    wrong = [line for line in lines if re.search(r"\berror\b|Error", line)]
    return (named or wrong[:1] or lines[-1:] or ["it said nothing"])[0][:300]
