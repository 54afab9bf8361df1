"""What docs/benchmarks.md says about models that llama.cpp could run."""

from __future__ import annotations

import statistics

from benchmarks.common.record import Record, Row
from benchmarks.common.tables import pick, records, source, table

BASE = "the default"
BUDGETS = {"narrow": "18M tokens, width 64", "pays": "2M tokens, width 128"}
QUESTION = """\
## What would a looped model cost that llama.cpp runs?

Two looped containers of llama.cpp, trained as they are run there, against the default: bits per
byte on held-out State of the Union speeches at equal FLOPs and four loops, one value for each seed;
lower is better. 0.5 % is what such a preset may cost. `portable` costs nothing that can be told
from zero, and its weights stand in a file once; `hrm_text` would hold them twice. What matters is
that embeddings enter the first loop at the size of a normed state."""


def section() -> str:
    found = [r for budget in BUDGETS for r in records("portable.run", budget)]
    if not found:
        return f"{QUESTION}\n\nNot measured yet: `python -m benchmarks.portable.run` does."
    parts = [QUESTION, *(f"{BUDGETS[r['variant']]}:\n\n{lines(r)}" for r in found)]
    return "\n\n".join([*parts, source(*found)])


def lines(record: Record) -> str:
    rows = record["rows"]
    base = {row["seed"]: reached(row) for row in pick(rows, name=BASE)}
    cells = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = sorted(pick(rows, name=name), key=lambda row: row["seed"])
        changes = [reached(r) / base[r["seed"]] - 1 for r in mine if r["seed"] in base]
        against = "" if name == BASE else f"{100 * statistics.mean(changes):+.1f} %"
        cells.append([name, ", ".join(f"{reached(row):.3f}" for row in mine), against])
    return table(["model", "bits per byte", "against the default"], cells)


def reached(row: Row) -> float:
    value: float = row["bits_per_byte_by_loop"][-1]
    return value
