"""Would a test notice? One-line mutants of the code, each against the tests of its own file.

    python -m benchmarks.mutation.run --count 150 --jobs 2
    python -m benchmarks.mutation.run --files looptx_core/training/optimizer.py --count 10
    python -m benchmarks.mutation.run --mutant FILE OLD NEW [--mutant FILE OLD NEW]

Mutants are drawn by a seed, from each file alike. Every job works on a copy of the tree. A mutant
is killed where a test fails or the tests take too long; survivors are printed with the line before
and after. Read them: `equivalent.yaml` has the reason for those that change nothing that can be
seen, and the others want a test. A run over all files writes the record.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common.record import ROOT, write
from benchmarks.mutation.mutants import Mutant, mutants_of, one_mutant

# A source file, and the tests that own it: they take seconds.
TESTS: dict[str, tuple[str, ...]] = {
    "looptx_core/training/objective.py": ("test_training_objective.py",),
    "looptx_core/training/loop_schedule.py": ("test_training_objective.py", "test_plan.py"),
    "looptx_core/training/optimizer.py": ("test_training_optimizer.py",),
    "looptx_core/training/muon.py": ("test_training_optimizer.py",),
    "looptx_core/parallel/memory.py": ("test_plan.py",),
    "looptx_core/training/calibration.py": ("test_training_calibration.py",),
    "looptx_core/stopping/rule.py": ("test_exits.py",),
    "looptx_core/stopping/calibration.py": ("test_exits.py", "test_training_calibration.py"),
    "looptx_core/generation/sampling.py": ("test_sampling.py",),
    "looptx_core/inspection/influence.py": (
        "test_influence.py",
        "test_inspection.py -k influential",
    ),
    "looptx_core/inspection/frontier.py": ("test_frontier.py",),
    "looptx_core/model/flops.py": ("test_flops.py", "test_training_objective.py"),
    "looptx_core/model/loop.py": ("test_model.py", "test_training_objective.py -k score"),
    "looptx_core/model/confidence.py": (
        "test_model.py",
        "test_training_objective.py",
        "test_training_calibration.py -k log_odds",
    ),
    "looptx_core/backends/cpu/decode.cpp": ("test_cpu_kernel.py",),
    "looptx_core/backends/cpu/products.h": ("test_cpu_kernel.py",),
    "looptx_core/backends/cpu/vectors.h": ("test_cpu_kernel.py",),
}
LEAST_TIMEOUT = 60.0  # seconds, beside four times what the unchanged code takes


class Copy:
    """A copy of the tree in which one mutant at a time is tested."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in ("looptx_core", "looptx_cli", "tests", "examples", "pyproject.toml"):
            source = ROOT / part
            if source.is_dir():
                skipped = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, folder / part, ignore=skipped)
            else:
                shutil.copy2(source, folder / part)
        self.scratch = folder.parent / "scratch"  # compiled kernels are for all copies
        self.scratch.mkdir(exist_ok=True)

    def test(self, file: str, timeout: float | None = None) -> tuple[str, float]:
        """'passed', 'failed' or 'too long', and seconds."""
        began = time.monotonic()
        for tests in TESTS[file]:
            # Without bytecode: a mutant may have the size and the time of the file before it.
            command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                       "--no-header", *f"tests/{tests}".split()]  # fmt: skip
            environment = {**os.environ, "PYTHONPATH": str(self.folder),
                           "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(self.scratch),
                           "OMP_NUM_THREADS": "1"}  # fmt: skip
            try:
                done = subprocess.run(command, cwd=self.folder, env=environment, timeout=timeout,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      text=True)  # fmt: skip
            except subprocess.TimeoutExpired:
                return "too long", time.monotonic() - began
            if done.returncode:
                self.said = done.stdout
                return "failed", time.monotonic() - began
        return "passed", time.monotonic() - began

    def test_mutant(self, mutant: Mutant, timeout: float) -> tuple[str, float]:
        path = self.folder / mutant.file
        before = path.read_text("utf-8")
        path.write_text(mutant.apply(before), "utf-8")
        try:
            return self.test(mutant.file, timeout)
        finally:
            path.write_text(before, "utf-8")


def drawn(files: list[str], count: int, seed: int) -> list[Mutant]:
    """Mutants from each file in turn, without repetition."""
    rng = random.Random(seed)
    left = {file: mutants_of(ROOT, file) for file in files}
    for each in left.values():
        rng.shuffle(each)
    found: list[Mutant] = []
    while len(found) < count and any(left.values()):
        found += [each.pop() for each in left.values() if each]
    return found[:count]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="copies that are tested at a time")
    parser.add_argument("--files", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--mutant", nargs=3, action="append", metavar=("FILE", "OLD", "NEW"),
                        help="this very change instead; may be repeated")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="show the mutants, test none")
    flags = parser.parse_args()

    if flags.mutant:
        chosen = [one_mutant(ROOT, *each) for each in flags.mutant]
    else:
        chosen = drawn(flags.files, flags.count, flags.seed)
    if flags.list:
        for mutant in chosen:
            print(f"{mutant.file}:{mutant.line}\n{mutant.shown}\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="looptx-mutation-") as temporary:
        rows = tested(chosen, flags.jobs, Path(temporary))
    survivors = [row for row in rows if row["result"] == "survived"]
    print(f"{len(rows)} mutants, {len(rows) - len(survivors)} killed, {len(survivors)} survived")
    if not flags.mutant and flags.files == list(TESTS):
        what = "One-line mutants of the code, each against the tests of its own file."
        variant = f"seed-{flags.seed}" if flags.seed else ""
        settings = {"seed": flags.seed, "jobs": flags.jobs}
        write("mutation.run", what, rows, variant=variant, settings=settings, threads=1)
    return 0


def reasons() -> dict[tuple[str, str], str]:
    """Why a mutant is equivalent, by its file and its lines as they are shown."""
    known = yaml.safe_load(Path(__file__).with_name("equivalent.yaml").read_text("utf-8"))
    return {
        (each["file"], f"- {each['before']}\n+ {each['after']}"): each["reason"].strip()
        for each in known
    }


def tested(mutants: list[Mutant], jobs: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each mutant. Stops where a file's tests fail without any change."""
    copies: queue.Queue[Copy] = queue.Queue()
    for number in range(jobs):
        copies.put(Copy(folder / str(number)))
    limits: dict[str, float] = {}
    known = reasons()

    def in_a_copy(work: Any) -> Any:
        copy = copies.get()
        try:
            return work(copy)
        finally:
            copies.put(copy)

    def baseline(file: str) -> None:
        def work(copy: Copy) -> None:
            result, seconds = copy.test(file)
            if result != "passed":
                raise SystemExit(f"{file}: its tests fail without a change\n{copy.said[-3000:]}")
            limits[file] = LEAST_TIMEOUT + 4 * seconds
            print(f"{file}: {seconds:.0f} s unchanged", file=sys.stderr, flush=True)

        in_a_copy(work)

    def one(mutant: Mutant) -> dict[str, Any]:
        result, seconds = in_a_copy(lambda copy: copy.test_mutant(mutant, limits[mutant.file]))
        print(f"{result:>8} {seconds:4.0f} s  {mutant.file}:{mutant.line}", file=sys.stderr)
        if result == "passed":  # at once: a long run may be cut short
            print(f"survived: {mutant.file}:{mutant.line}\n{mutant.shown}\n", flush=True)
        before, after = (line[2:] for line in mutant.shown.split("\n"))
        reason = known.get((mutant.file, mutant.shown), "") if result == "passed" else ""
        return {
            "file": mutant.file, "line": mutant.line, "before": before, "after": after,
            "result": {"passed": "survived", "failed": "killed"}.get(result, result),
            "seconds": round(seconds, 1), "reason": reason,
        }  # fmt: skip

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(baseline, dict.fromkeys(mutant.file for mutant in mutants)))
        return list(pool.map(one, mutants))


if __name__ == "__main__":
    sys.exit(main())
