"""The n-th write, fsync or rename of a training fails, for each n: does it say so, and go on after?

    python -m benchmarks.reliability.failures [--minutes 30] [--record]

A write fails with ENOSPC, once or for good; an fsync and a rename once, with EIO. The command must
end well, or with one clear line and exit code 1; what lay there must be whole; and the resumed run
must equal an uninterrupted one bit for bit.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.reliability import forks
from benchmarks.reliability.kills import Trainings, broken_off, result

SORTS = ("write", "fsync", "rename")


class Way(NamedTuple):
    """How a call fails."""

    sort: str
    error: int
    lasting: bool
    """Whether all that come after it fail, too."""


WAYS = (
    Way("write", errno.ENOSPC, True), Way("write", errno.ENOSPC, False),
    Way("fsync", errno.EIO, False), Way("rename", errno.EIO, False),
)  # fmt: skip
SHORTER = {"steps": 9, "save_every": 3, "val_every": 3, "log_every": 3, "keep": 2}
LIBRARY = "FAIL_LIBRARY"  # where the parent put the library, for its own new start


def start_again() -> None:
    """Start this program anew with the library in front of libc."""
    with tempfile.TemporaryDirectory(prefix="looptx-fail-") as folder:
        library = Path(folder) / "fail.so"
        source = Path(__file__).with_name("fail.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), LIBRARY: str(library)}
        command = [sys.executable, "-m", "benchmarks.reliability.failures", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)


def arm(way: Way, at: int) -> Any:
    def first() -> None:
        ctypes.CDLL(None).fail_arm(SORTS.index(way.sort), at, way.error, int(way.lasting))

    return first


def counts(trainings: Trainings) -> dict[str, int]:
    """How many calls of each sort a whole run makes."""
    found = trainings.scratch / "counts"

    def first() -> None:
        library = ctypes.CDLL(None)
        library.fail_arm(-1, 0, 0, 0)
        leave = os._exit

        def last(code: int) -> None:
            found.write_text(json.dumps([library.fail_count(n) for n in range(3)]))
            leave(code)

        os._exit = last  # type: ignore[assignment]

    done = trainings.start("whole", first=first)
    if done.code:
        raise RuntimeError(done.err)
    return dict(zip(SORTS, json.loads(found.read_text())))


def one_failure(
    trainings: Trainings, whole: tuple[bytes, Any], way: Way, at: int
) -> tuple[str, str]:
    """(what went wrong, '' for nothing; how the command ended)."""
    run = trainings.scratch / "failed"
    for left in run.parent.glob("*failed*"):
        shutil.rmtree(left, ignore_errors=True)
    done = trainings.start("failed", first=arm(way, at))
    lines = done.err.strip().splitlines()
    last = lines[-1] if lines else ""
    if done.code not in (0, 1) or "internal error" in last or "Traceback" in done.err:
        return f"exit code {done.code}, signal {done.signal}: {last}", "wrong"
    if done.code and not last.startswith("looptx: error: "):
        return f"no line: {last!r}", "wrong"
    if lost := broken_off(trainings, "failed", None):
        return f"lost {lost}", "wrong"
    if done.code:
        after = trainings.finish("failed")
        if after.code:
            return f"not resumed: {after.err.strip().splitlines()[-1:]}, after: {last}", "wrong"
    weights, metrics = result(run)
    if weights != whole[0] or metrics != whole[1]:
        return "other weights or metrics", "wrong"
    return "", "went on" if done.code == 0 else "said so"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="stop after so many; the calls come in a random order")  # fmt: skip
    parser.add_argument("--record", action="store_true", help="write a record of the run")
    flags = parser.parse_args()
    if LIBRARY not in os.environ:
        start_again()
    del os.environ["LD_PRELOAD"]  # compilers and the like need none of it
    forks.prepare()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="looptx-failures-") as scratch:
        trainings = Trainings(Path(scratch), 0, **SHORTER)
        trainings.start("whole")
        total = counts(trainings)
        whole = result(trainings.scratch / "whole")
        every = [(way, at) for way in WAYS for at in range(1, total[way.sort] + 1)]
        random.Random(0).shuffle(every)
        ends: dict[Way, Counter[str]] = {way: Counter() for way in WAYS}
        wrong: dict[Way, set[str]] = {way: set() for way in WAYS}
        began = time.monotonic()
        for number, (way, at) in enumerate(every, 1):
            if time.monotonic() - began > 60 * flags.minutes:
                break
            said, end = one_failure(trainings, whole, way, at)
            ends[way][end] += 1
            if said and said not in wrong[way]:
                wrong[way].add(said)
                print(f"{way} {at} of {total[way.sort]}: {said}", flush=True)
            if number % 20 == 0:
                print(f"{number} of {len(every)}", file=sys.stderr, flush=True)
        rows = [
            {"part": "failures", "call": way.sort, "lasting": way.lasting,
             "calls": total[way.sort], "tried": ends[way].total(), **ends[way],
             "kinds_wrong": sorted(wrong[way])} for way in WAYS
        ]  # fmt: skip
    for row in rows:
        print(json.dumps(row))
    if flags.record:
        from benchmarks.common.record import write

        write("reliability.failures", __doc__.splitlines()[0], rows, settings=SHORTER)
    return 1 if any(row.get("wrong") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
