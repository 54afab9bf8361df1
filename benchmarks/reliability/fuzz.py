"""Spoilt inputs for every command: is there an internal error, a hang, a crash, or too much memory?

    python -m benchmarks.reliability.fuzz                  # 5 minutes, on one core
    python -m benchmarks.reliability.fuzz --count 10000    # the long form
    python -m benchmarks.reliability.fuzz --replay 123     # one case again, its folder kept

A case is its seed and number: the same ones make the same files and arguments. What is found is
printed by kind with the number to replay.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability import cases, forks, sound

SECONDS, BYTES = 10.0, 2 << 30
CODES = (0, 1, 2, 3, 4)
_FRAME = re.compile(r'File "[^"]*?(looptx_c\w+/[^"]+)", line (\d+), in (\w+)')
_STEERS = re.compile("\x1b|\x9b|\x07")


@dataclass(frozen=True)
class Finding:
    """What is wrong with how a command ended."""

    sort: str
    """'internal error', 'hang', 'crash', 'memory', 'exit code', 'output' or 'message'."""
    where: str


def judge(done: forks.Outcome, arguments: list[str]) -> Finding | None:
    """What a command's end breaks of what is promised, if anything."""
    lines = done.err.strip().splitlines()
    last = lines[-1] if lines else ""
    if done.ended_for == "time" or done.cpu_seconds > SECONDS:
        return Finding("hang", " ".join(arguments[:1]))
    if done.ended_for == "memory" or done.peak_bytes > BYTES or "no memory left" in last:
        return Finding("memory", f"{arguments[0]}: {done.peak_bytes >> 20} MB")
    if done.signal:
        return Finding("crash", f"signal {done.signal}")
    if "internal error" in done.err or "Traceback (most" in done.err:
        error = next((line for line in lines if "internal error" in line), last)
        return Finding("internal error", error[:160])
    if done.code not in CODES:
        return Finding("exit code", f"{done.code}: {last[:120]}")
    if done.code and not last.startswith("looptx: error: "):
        return Finding("message", f"exit code {done.code}: {last[:120]!r}")
    # What a model writes is its own, when no terminal shows it.
    if _STEERS.search(done.err + (done.out if arguments[0] != "generate" else "")):
        return Finding("output", "an escape code")
    if "--json" in arguments and done.code == 0 and not _is_json(done.out):
        return Finding("output", "not JSON")
    return None


def _is_json(text: str) -> bool:
    def refuse(name: str) -> Any:
        raise ValueError(name)

    for part in (text, *text.splitlines()[-1:]):
        with contextlib.suppress(ValueError):
            json.loads(part, parse_constant=refuse)
            return True
    return False


class Fuzzer:
    """Cases in a scratch folder, with the sound inputs made once."""

    def __init__(self, seed: int, scratch: Path) -> None:
        self.seed, self.scratch = seed, scratch
        self.sound = scratch / "sound"
        os.environ.update(LOOPTX_CACHE=str(scratch / "cache"), HF_HUB_OFFLINE="1",
                          HF_MODULES_CACHE=str(scratch / "modules"))  # fmt: skip
        if not (self.sound / "llama/model.safetensors").is_file():
            shutil.rmtree(self.sound, ignore_errors=True)
            sound.make(self.sound)

    def one(self, number: int, keep: bool = False) -> tuple[cases.Case, forks.Outcome]:
        """Run one case."""
        folder = self.scratch / f"case-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            case = cases.make(self.seed, number, self.sound, folder)
            done = self._run(case, folder)
            if done.ended_for == "time" and done.cpu_seconds < SECONDS / 2 and not keep:
                # It waits for ever, or another program had the core: judge by processor time.
                shutil.rmtree(folder)
                folder.mkdir()
                case = cases.make(self.seed, number, self.sound, folder)
                done = self._run(case, folder, seconds=6 * SECONDS)
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
        return case, done

    def _run(
        self,
        case: cases.Case,
        folder: Path,
        environment: dict[str, str] | None = None,
        seconds: float = SECONDS,
    ) -> forks.Outcome:
        return forks.run(case.arguments, folder, seconds=seconds, most_bytes=BYTES,
                         stdin=case.stdin, environment=environment)  # fmt: skip

    def place(self, number: int) -> str:
        """Where an internal error comes from, by running its case again with a traceback."""
        folder = self.scratch / f"trace-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        case = cases.make(self.seed, number, self.sound, folder)
        done = self._run(case, folder, {"LOOPTX_DEBUG": "1"})
        shutil.rmtree(folder, ignore_errors=True)
        frames = _FRAME.findall(done.err)
        return ":".join(frames[-1][::2]) if frames else "?"


def fuzz(fuzzer: Fuzzer, numbers: range, minutes: float | None) -> list[dict[str, Any]]:
    """Rows of the record: one for each area, and one for each kind of finding."""
    ends: dict[str, Counter[str]] = defaultdict(Counter)
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    slowest, largest = 0.0, 0
    began = time.monotonic()
    for number in numbers:
        if minutes and time.monotonic() - began > 60 * minutes:
            break
        case, done = fuzzer.one(number)
        finding = judge(done, case.arguments)
        slowest, largest = max(slowest, done.cpu_seconds), max(largest, done.peak_bytes)
        ends[case.area]["inputs"] += 1
        ends[case.area][finding.sort if finding else f"exit code {done.code}"] += 1
        if finding:
            where = finding.where
            if finding.sort == "internal error":
                where = f"{fuzzer.place(number)}: {re.sub('[0-9]+', 'N', where)}"[:200]
            elif finding.sort == "memory":
                where = case.arguments[0]
            found[finding.sort, where].append(number)
            if len(found[finding.sort, where]) == 1:
                print(f"--replay {number}  {case.area}, {case.what}\n  {finding.sort}: {where}",
                      flush=True)  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"part": "areas", "area": area, **counts} for area, counts in sorted(ends.items())
    ]
    rows += [
        {
            "part": "findings",
            "sort": sort,
            "where": where,
            "count": len(cases_),
            "replay": cases_[0],
        }
        for (sort, where), cases_ in sorted(found.items())
    ]
    inputs = sum(counts["inputs"] for counts in ends.values())
    rows.append({"part": "all", "inputs": inputs, "findings": sum(map(len, found.values())),
                 "kinds": len(found), "slowest_cpu_seconds": round(slowest, 1),
                 "largest_megabytes": largest >> 20,
                 "minutes": round((time.monotonic() - began) / 60, 1)})  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="stop after so many")
    parser.add_argument("--count", type=int, help="run so many cases, however long that takes")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=int, metavar="N", help="run case N alone, and show it")
    parser.add_argument("--scratch", type=Path, help="keep the sound inputs here between runs")
    parser.add_argument("--record", action="store_true", help="write a record of the run")
    flags = parser.parse_args()
    forks.prepare()
    with contextlib.ExitStack() as stack:
        scratch = flags.scratch or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="looptx-fuzz-"))
        )
        fuzzer = Fuzzer(flags.seed, scratch.absolute())
        if flags.replay is not None:
            return replay(fuzzer, flags.replay)
        numbers = range(flags.first, flags.first + (flags.count or 10**9))
        rows = fuzz(fuzzer, numbers, None if flags.count else flags.minutes)
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))
    if flags.record:
        from benchmarks.common.record import write

        settings = {"seed": flags.seed, "first": flags.first, "seconds": SECONDS, "bytes": BYTES}
        write("reliability.fuzz", __doc__.splitlines()[0], rows, settings=settings)
    return 1 if rows[-1]["findings"] else 0


def replay(fuzzer: Fuzzer, number: int) -> int:
    os.environ["LOOPTX_DEBUG"] = "1"
    case, done = fuzzer.one(number, keep=True)
    print(f"{case.area}, {case.what}\nin {fuzzer.scratch / f'case-{number}'}: "
          f"looptx {' '.join(case.arguments)[:2000]!r}\n{done.out[-3000:]}\n{done.err[-6000:]}\n"
          f"exit code {done.code}, signal {done.signal}, {done.ended_for or 'ended by itself'}, "
          f"{done.seconds:.1f} s, {done.peak_bytes >> 20} MB")  # fmt: skip
    finding = judge(done, case.arguments)
    os.environ.pop("LOOPTX_DEBUG")
    return 1 if finding else 0


if __name__ == "__main__":
    sys.exit(main())
