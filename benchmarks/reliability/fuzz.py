"""Spoilt inputs for every command: is there an internal error, a hang, a crash, or too much memory?

    python -m benchmarks.reliability.fuzz                  # 5 minutes, on one core
    python -m benchmarks.reliability.fuzz --count 10000    # the long form
    python -m benchmarks.reliability.fuzz --replay 123     # one case again, its folder kept
    python -m benchmarks.reliability.fuzz --scratch DIR --again   # what a run found, on new code

A case is its seed and number: the same ones make the same files and arguments. What is found is
printed by kind with the number to replay. With --scratch, a run that was stopped goes on.
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
from dataclasses import dataclass, replace
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
        return Finding("memory", arguments[0])
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

    def one(
        self, number: int, keep: bool = False, **changes: Any
    ) -> tuple[cases.Case, forks.Outcome]:
        """Run one case. changes: of the case's fields."""
        folder = self.scratch / f"case-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            case = replace(cases.make(self.seed, number, self.sound, folder), **changes)
            done = self._run(case, folder)
            if done.ended_for == "time" and done.cpu_seconds < SECONDS / 2 and not keep:
                # It waits for ever, or another program had the core: judge by processor time.
                shutil.rmtree(folder)
                folder.mkdir()
                cases.make(self.seed, number, self.sound, folder)
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


class Log:
    """A line for each case, so that a run that was killed goes on where it ended."""

    def __init__(self, file: Path, seed: int) -> None:
        self.file, self.seed = file, seed
        lines = map(json.loads, file.read_text().splitlines()) if file.is_file() else ()
        self.lines = {line["number"]: line for line in lines if line["seed"] == seed}

    def add(
        self, number: int, case: cases.Case, done: forks.Outcome, finding: Finding | None
    ) -> None:
        line = {"seed": self.seed, "number": number, "area": case.area, "code": done.code,
                "seconds": done.seconds, "cpu_seconds": done.cpu_seconds,
                "peak_bytes": done.peak_bytes}  # fmt: skip
        if finding:  # enough to run it on later code, which has other options to draw from
            line |= {"sort": finding.sort, "where": finding.where, "what": case.what,
                     "arguments": case.arguments,
                     "stdin": case.stdin.decode("latin-1")}  # fmt: skip
        self.lines[number] = line
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def found(self) -> list[dict[str, Any]]:
        return [line for line in self.lines.values() if "sort" in line]

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the record: one for each area, and one for each kind of finding."""
        ends: dict[str, Counter[str]] = defaultdict(Counter)
        kinds: dict[tuple[str, str], list[int]] = defaultdict(list)
        for line in self.lines.values():
            ends[line["area"]]["inputs"] += 1
            ends[line["area"]][line.get("sort", f"exit code {line['code']}")] += 1
            if "sort" in line:
                kinds[line["sort"], line["where"]].append(line["number"])
        every = self.lines.values()
        return [
            *({"part": "areas", "area": area, **counts} for area, counts in sorted(ends.items())),
            *({"part": "findings", "sort": sort, "where": where, "count": len(numbers),
               "replay": numbers[0]} for (sort, where), numbers in sorted(kinds.items())),
            {"part": "all", "inputs": len(every), "findings": len(self.found()),
             "kinds": len(kinds),
             "slowest_cpu_seconds": round(max(line["cpu_seconds"] for line in every), 1),
             "largest_megabytes": max(line["peak_bytes"] for line in every) >> 20,
             "minutes": round(sum(line["seconds"] for line in every) / 60, 1)},
        ]  # fmt: skip


def fuzz(fuzzer: Fuzzer, log: Log, numbers: range, minutes: float | None) -> None:
    """Run the cases that the log does not have yet."""
    began, kinds = time.monotonic(), {(line["sort"], line["where"]) for line in log.found()}
    for number in numbers:
        if minutes and time.monotonic() - began > 60 * minutes:
            break
        if number in log.lines:
            continue
        case, done = fuzzer.one(number)
        finding = judge(done, case.arguments)
        if finding and finding.sort == "internal error":
            where = f"{fuzzer.place(number)}: {re.sub('[0-9]+', 'N', finding.where)}"[:200]
            finding = Finding(finding.sort, where)
        log.add(number, case, done, finding)
        if finding and (finding.sort, finding.where) not in kinds:
            kinds.add((finding.sort, finding.where))
            print(f"--replay {number}  {case.area}, {case.what}\n  {finding.sort}: {finding.where}",
                  flush=True)  # fmt: skip
        if len(log.lines) % 100 == 0:
            minutes_so_far = (time.monotonic() - began) / 60
            print(f"{len(log.lines)} inputs, {len(log.found())} findings of {len(kinds)} kinds, "
                  f"{minutes_so_far:.0f} minutes", file=sys.stderr, flush=True)  # fmt: skip


def again(fuzzer: Fuzzer, log: Log) -> list[dict[str, Any]]:
    """The log's rows, with how many of each kind of finding are left on the code of today."""
    left: Counter[tuple[str, str]] = Counter()
    for line in log.found():
        case, done = fuzzer.one(line["number"], arguments=line["arguments"],
                                stdin=line["stdin"].encode("latin-1"))  # fmt: skip
        if finding := judge(done, case.arguments):
            left[line["sort"], line["where"]] += 1
            print(f"--replay {line['number']}  still {finding.sort}: {finding.where}", flush=True)
    rows = log.rows()
    for row in rows:
        if row["part"] == "findings":
            row["left"] = left[row["sort"], row["where"]]
    rows[-1]["left"] = left.total()
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
    parser.add_argument("--again", action="store_true", help="run the findings of DIR again")
    parser.add_argument("--scratch", type=Path, metavar="DIR",
                        help="keep the sound inputs and the log here between runs")  # fmt: skip
    parser.add_argument("--record", action="store_true", help="write a record of the run")
    flags = parser.parse_args()
    forks.prepare()
    with contextlib.ExitStack() as stack:
        scratch = flags.scratch or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="looptx-fuzz-"))
        )
        fuzzer = Fuzzer(flags.seed, scratch.absolute())
        log = Log(scratch / "cases.jsonl", flags.seed)
        if flags.replay is not None:
            return replay(fuzzer, flags.replay)
        if flags.again:
            rows = again(fuzzer, log)
        else:
            numbers = range(flags.first, flags.first + (flags.count or 10**9))
            fuzz(fuzzer, log, numbers, None if flags.count else flags.minutes)
            rows = log.rows()
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))
    if flags.record:
        from benchmarks.common.record import write

        settings = {"seed": flags.seed, "first": flags.first, "seconds": SECONDS, "bytes": BYTES}
        write("reliability.fuzz", __doc__.splitlines()[0], rows, settings=settings)
    return 1 if rows[-1].get("left", rows[-1]["findings"]) else 0


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
