"""What the sections of docs/benchmarks.md are written with."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.common.record import ROOT, Record, Row, read


def all_records(folder: Path = ROOT / "benchmarks") -> list[Record]:
    """Every record of a question; raises ValueError where one breaks the schema."""
    questions = sorted(file.parent for file in folder.glob("*/section.py"))
    return [read(file) for folder in questions for file in sorted(folder.glob("results/*.json"))]


def records(benchmark: str, variant: str = "") -> list[Record]:
    """The newest record of each machine, the newest first."""
    found = [r for r in all_records() if (r["benchmark"], r["variant"]) == (benchmark, variant)]
    newest: dict[str, Record] = {}
    for record in sorted(found, key=lambda r: r["date"]):
        newest[record["machine"]["name"]] = record
    return sorted(newest.values(), key=lambda r: (r["date"], r["machine"]["name"]), reverse=True)


def newest(benchmark: str, variant: str = "", machine: str = "") -> Record:
    """The newest record, of machines whose name holds `machine`."""
    for record in records(benchmark, variant):
        if machine in record["machine"]["name"]:
            return record
    raise LookupError(f"no record of {benchmark} {variant!r} on {machine or 'any machine'}")


def pick(rows: Iterable[Row], **columns: object) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in columns.items())]


def one(rows: Iterable[Row], **columns: object) -> Row:
    """The only row with these values."""
    (row,) = pick(rows, **columns)
    return row


def mean(rows: Sequence[Row], column: str) -> float:
    return statistics.mean(row[column] for row in rows)


def table(heads: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    cells = [heads, ["---"] * len(heads), *lines]
    if any(len(line) != len(heads) for line in cells):
        raise ValueError(f"lines differ in length from the heads {list(heads)}")
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in cells)


def source(*found: Record) -> str:
    """Where figures come from: command, machine, date and commit of each record."""
    lines = []
    for record in found:
        machine, threads = record["machine"], record["machine"]["threads"]
        where = [machine["name"], f"{threads} thread{'s' * (threads > 1)}" if threads else ""]
        facts = [*where, machine["state"], record["date"], f"commit {record['commit']}"]
        lines.append(f"- `{record['command']}`: {', '.join(filter(None, facts))}")
    return "\n".join(lines)


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"
