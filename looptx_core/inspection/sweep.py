"""What a sweep found: losses of its runs, their means with intervals, as a document and a chart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from looptx_core.checkpoint.run_summary import read_run
from looptx_core.config.sweep import Cell, Grid, shown
from looptx_core.errors import LooptxError
from looptx_core.inspection.charts import COLOURS, Chart, Series

SCHEMA_VERSION = 1
Document = dict[str, Any]

# Student's t, the two-sided 95 % quantile by degrees of freedom from 1 on.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
      2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
      2.052, 2.048, 2.045, 2.042)  # fmt: skip
_Z = 1.959964


def interval(values: Sequence[float]) -> float | None:
    """Half the length of the 95 % interval of a mean, by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    free = len(values) - 1
    # The first terms of the expansion in 1 / free, right to 0.0005 beyond the table.
    t = _T[free - 1] if free <= len(_T) else _Z + (_Z**3 + _Z) / (4 * free)
    return t * statistics.stdev(values) / math.sqrt(len(values))


def final_loss(run: Path) -> float | None:
    """The held-out loss of a finished run at its last loop, nats a token; None of other folders."""
    if not (run / "config.yaml").is_file():
        return None
    try:
        details = read_run(run)
    except LooptxError:
        return None
    losses = details.facts.get("loss_by_loop")
    if details.summary.state != "finished" or not isinstance(losses, list) or not losses:
        return None
    return float(losses[-1])


def sweep_document(grid: Grid, folder: Path, errors: Mapping[str, str]) -> Document:
    """What `looptx sweep --json` prints, from the runs in a folder.

    errors: of runs that failed, by name.
    """
    rows, runs = [], []
    for cells in grid.cells:
        losses = {cell.seed: final_loss(folder / cell.name) for cell in cells}
        found = [loss for loss in losses.values() if loss is not None]
        rows.append({
            "settings": {key: _plain(value) for key, value in cells[0].varied.items()},
            "seeds": len(found),
            "mean_loss": statistics.fmean(found) if found else None,
            "interval": interval(found),
        })  # fmt: skip
        runs += [_run(cell, folder, losses[cell.seed], errors.get(cell.name)) for cell in cells]
    return {
        "schema_version": SCHEMA_VERSION,
        "out": str(folder),
        "fixed": {key: _plain(value) for key, value in grid.fixed.items()},
        "rows": rows,
        "runs": runs,
    }


def _run(cell: Cell, folder: Path, loss: float | None, error: str | None) -> Document:
    started = (folder / cell.name / "config.yaml").is_file()
    state = "finished" if loss is not None else "failed" if error else None
    return {
        "folder": str(folder / cell.name),
        "settings": {key: _plain(value) for key, value in cell.varied.items()},
        "seed": cell.seed,
        "state": state or ("unfinished" if started else "new"),
        "loss": loss,
        "error": error,
    }


def best_row(document: Document) -> int | None:
    """The row of the lowest mean; None where no run has finished."""
    means = [(row["mean_loss"], n) for n, row in enumerate(document["rows"])
             if row["mean_loss"] is not None]  # fmt: skip
    return min(means)[1] if means else None


def sweep_chart(grid: Grid, document: Document) -> Chart:
    """Mean losses with their intervals; the key with the most values is the x axis, and each
    combination of the others a line."""
    across = max(grid.axes, key=lambda key: len(grid.axes[key]), default=None)
    names = [shown(value) for value in grid.axes[across]] if across else ["all"]
    lines: dict[str, list[tuple[float, Document]]] = {}
    for cells, row in zip(grid.cells, document["rows"]):
        varied = dict(cells[0].varied)
        place = grid.axes[across].index(varied.pop(across)) if across else 0
        name = ", ".join(f"{key} {shown(value)}" for key, value in varied.items())
        lines.setdefault(name, []).append((place, row))
    series = [
        Series(
            name,
            [(place, row["mean_loss"]) for place, row in points],
            colour=number % len(COLOURS),
            errors=[row["interval"] or 0.0 for _, row in points],
        )
        for number, (name, points) in enumerate(lines.items())
    ]
    return Chart(
        "Held-out loss, mean over seeds with 95 % interval", across or "", "nats a token", series,
        names=names,
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """As a JSON value."""
    return list(value) if isinstance(value, tuple) else value
