"""A server in a process of its own, and what it uses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Use(NamedTuple):
    """What a process uses now, by /proc."""

    cpu: float
    """Seconds of processor time so far."""
    resident: int
    """Bytes of memory."""
    threads: int
    files: int


class Server:
    """`looptx serve` with a model; `address` is where it answers."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process, self.address = process, address

    def use(self) -> Use:
        place = Path(f"/proc/{self.process.pid}")
        fields = (place / "stat").read_text("ascii").rpartition(")")[2].split()
        ticks = os.sysconf("SC_CLK_TCK")
        pages = int((place / "statm").read_text("ascii").split()[1])
        return Use(
            (int(fields[11]) + int(fields[12])) / ticks,
            pages * os.sysconf("SC_PAGE_SIZE"),
            int(fields[17]),
            len(list((place / "fd").iterdir())),
        )


@contextmanager
def serving(*arguments: str, threads: int = 1) -> Iterator[Server]:
    """A server that is ended by SIGTERM. Raises `AssertionError` if it then fails."""
    process = subprocess.Popen(
        [sys.executable, "-m", "looptx_cli.main", "serve", "--port", "0", "--quiet", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http"), "the server did not start"
        yield Server(process, address)
    finally:
        process.terminate()
        code = process.wait(60)
    assert code == 0, f"the server ended with {code}"
