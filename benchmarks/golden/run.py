"""Does a change leave the results as they were? Runs two commits side by side and compares.

    python benchmarks/golden/run.py                      # 51e7a4a against the working tree
    python benchmarks/golden/run.py --base main --only generate train
    python benchmarks/golden/run.py --speed              # processor time instead of results

The base commit is checked out beside this tree; both run with this Python through the command
line. Exit code 1 where a field differs by more than expected.yaml allows. Kernels are compiled at
first, once a machine.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from records import GROUPS, Records, difference, prepare
from side import CommandFailed, Side
from speed import compare_speed

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BASE = "51e7a4a"


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """The tree of a commit, as a git worktree that is gone afterwards."""
    git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def records_of(side: Side, sources: Path, groups: Sequence[str]) -> tuple[Records, dict[str, str]]:
    """The records of one side, and what went wrong by group."""
    prepare(side, sources)
    records: Records = {}
    failures: dict[str, str] = {}
    for name in groups:
        try:
            records |= GROUPS[name](side)
        except (CommandFailed, KeyError, ValueError, OSError):
            failures[name] = traceback.format_exc(limit=-2)
        print(f"{side.name}: {name}", file=sys.stderr, flush=True)
    return records, failures


def compare(
    old: Records, new: Records, expected: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each field: its largest difference and whether it is allowed."""
    rows = []
    for record in dict.fromkeys([*old, *new]):
        before, after = old.get(record, {}), new.get(record, {})
        for field in dict.fromkeys([*before, *after]):
            apart = difference(before.get(field), after.get(field))
            rule = _rule(f"{record}/{field}", expected)
            limit = 0.0 if rule is None else rule["tolerance"]
            allowed = apart == 0 or limit == "any" or apart <= float(limit)
            rows.append({
                "record": record, "field": field, "difference": _json(apart), "allowed": allowed,
                "reason": rule["reason"] if rule and apart else None,
            })  # fmt: skip
    return rows


def _rule(name: str, expected: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    return next((rule for pattern, rule in expected.items() if fnmatch(name, pattern)), None)


def _json(number: float) -> float | str:
    return number if math.isfinite(number) else "other"


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each record: identical, or its differing fields."""
    lines = []
    for record in dict.fromkeys(row["record"] for row in rows):
        differing = [r for r in rows if r["record"] == record and r["difference"] != 0]
        lines.append(f"{record:<36} {'identical' if not differing else ''}".rstrip())
        for row in differing:
            size = row["difference"]
            size = size if isinstance(size, str) else f"{size:.3g}"
            mark = f"expected: {row['reason']}" if row["allowed"] else "NOT EXPECTED"
            lines.append(f"    {row['field']:<32} {size:>10}  {mark}")
    return "\n".join(lines)


def provenance(base: str) -> dict[str, Any]:
    changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {
        "command": " ".join(["python", "benchmarks/golden/run.py", *sys.argv[1:]]),
        "base": git("rev-parse", "--short", base),
        "head": git("rev-parse", "--short", "HEAD") + (" with changes" if changed else ""),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "lightning", "transformers", "numpy")},
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=BASE, help="the commit to compare with")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--serial", action="store_true", help="one side after the other")
    parser.add_argument("--speed", action="store_true", help="compare processor time")
    parser.add_argument("--rounds", type=int, default=10, help="alternations of --speed")
    parser.add_argument("--out", type=Path, help="where to write the JSON record")
    flags = parser.parse_args()
    expected = yaml.safe_load((HERE / "expected.yaml").read_text("utf-8")) or {}

    document = provenance(flags.base)
    with tempfile.TemporaryDirectory(prefix="looptx-golden-") as temporary:
        top = Path(temporary).resolve()
        with checked_out(flags.base, top / "base-tree") as tree:
            old, new = Side("base", tree, top / "base"), Side("head", ROOT, top / "head")
            if flags.speed:
                for side in (old, new):
                    prepare(side, tree)
                document["rows"] = compare_speed(old, new, flags.rounds)
                failures: dict[str, str] = {}
            else:
                groups = [g for g in GROUPS if g in flags.only or g == "tokenize"]
                with ThreadPoolExecutor(1 if flags.serial else 2) as pool:
                    running = [pool.submit(records_of, s, tree, groups) for s in (old, new)]
                    (before, failed), (after, broken) = (each.result() for each in running)
                failures = {f"base: {k}": v for k, v in failed.items()}
                failures |= {f"head: {k}": v for k, v in broken.items()}
                document["rows"] = compare(before, after, expected)
                document["failures"] = failures
                print(table(document["rows"]))
    for name, text in failures.items():
        print(f"\nfailed, {name}:\n{text}")
    out = flags.out or ROOT / "bench-results" / f"golden{'-speed' if flags.speed else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    bad = [row for row in document["rows"] if not row.get("allowed", True)]
    if not flags.speed:
        records = {row["record"] for row in document["rows"]}
        print(f"\n{len(records)} records, {len(document['rows'])} fields; {len(bad)} not expected, "
              f"{len(failures)} groups failed; {out}")  # fmt: skip
    return 1 if bad or failures else 0


if __name__ == "__main__":
    sys.exit(main())
