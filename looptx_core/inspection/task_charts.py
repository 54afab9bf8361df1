"""An evaluation's charts: each metric by loops a token, fixed depths beside the exit's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from looptx_core.inspection.charts import FIXED, Chart, Mark, Series


def task_charts(document: Mapping[str, Any]) -> list[Chart]:
    """A chart for each task and metric of the document of an evaluation."""
    found = []
    rows = document["results"]
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        own = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        fixed = [row for row in own if row["loops"] != "auto"]
        line = Series(
            "fixed depth", [(row["mean_loops"], row["value"]) for row in fixed], FIXED,
            errors=[row["stderr"] or 0.0 for row in fixed],
        )  # fmt: skip
        marks = [Mark(r["mean_loops"], "auto", r["value"]) for r in own if r["loops"] == "auto"]
        # A legend comes with two lines or more, and the exit's point wants its name.
        found.append(Chart(task, "loops a token", metric, [line] if fixed else [], marks=marks))
    return found
