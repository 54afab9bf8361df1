"""One side of the comparison: a source tree, a folder to work in, and commands run from it.

Everything goes through the command line's entry point, so a tree may rename whatever lies behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENTRY = "import sys; from looptx_cli.main import main; sys.exit(main())"

# Reads a command a line, as a JSON list; answers each with its exit code, output and seconds of
# processor time. The first answer names the package that was imported.
SERVER = """
import contextlib, io, json, sys, time
import looptx_core
from looptx_cli.main import main

answers = sys.stdout
print(json.dumps(looptx_core.__file__), file=answers, flush=True)
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        began = time.process_time()
        code = main(json.loads(line))
        seconds = time.process_time() - began
    answer = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": seconds}
    print(json.dumps(answer), file=answers, flush=True)
"""


class CommandFailed(Exception):
    """A command of one side ended otherwise than expected."""


@dataclass(frozen=True)
class Side:
    """A tree of sources and the folder in which its commands run."""

    name: str
    tree: Path
    folder: Path

    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("LOOPTX_")}
        # Both sides take every fused kernel: what a trial chooses would differ in the last bits.
        tries = (self.tree / "looptx_core" / "training" / "kernel_trial.py").exists()
        return {
            **kept,
            **({"LOOPTX_KERNELS": "all"} if tries else {}),
            "PYTHONPATH": str(self.tree),
            "OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", "1"),
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(self.folder / "modules"),
            "LOOPTX_CACHE": str(self.folder.parent / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def python(self, program: str, *arguments: str) -> str:
        """Standard output of a program in this tree. Raises `CommandFailed`."""
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=self.folder, env=self.environment(), capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise CommandFailed(f"{self.name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        return done.stdout

    def command(self, *arguments: str) -> str:
        """Standard output of one command in a process of its own. Raises `CommandFailed`."""
        try:
            return self.python(ENTRY, *arguments)
        except CommandFailed as error:
            raise CommandFailed(f"looptx {' '.join(arguments)}\n{error}") from None

    def interrupted(self, *arguments: str, step: int) -> None:
        """Run a training with --json and interrupt it once it has reported this step."""
        process = subprocess.Popen(
            [sys.executable, "-c", ENTRY, *arguments],
            cwd=self.folder, env=self.environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout
        for line in process.stdout:
            if json.loads(line).get("step", 0) >= step:
                process.send_signal(signal.SIGINT)
                break
        process.communicate(timeout=300)
        if process.returncode != 130:
            raise CommandFailed(f"{self.name}: interrupted run ended with {process.returncode}")


class Server:
    """A process that runs many commands of one side, so that imports are paid for once."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=side.folder, env=side.environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        imported = Path(self._answer())
        if not imported.is_relative_to(side.tree):
            raise CommandFailed(f"{side.name}: imported {imported}, which is not in {side.tree}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def run(self, *arguments: str) -> tuple[str, float]:
        """Standard output of a command, and its processor time in seconds."""
        assert self.process.stdin
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        answer = self._answer()
        if answer["code"]:
            raise CommandFailed(f"{self.side.name}: looptx {' '.join(arguments)}\n{answer['err']}")
        return answer["out"], answer["seconds"]

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise CommandFailed(f"{self.side.name}: the process ended with {self.process.wait()}")
        return json.loads(line)
