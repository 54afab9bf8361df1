"""What a page's slider moves through: each rule's thresholds, and the depths that they give."""

from __future__ import annotations

import math
from typing import Any

import torch

from looptx_core.config.generation import ExitSettings
from looptx_core.inspection.charts import lower_edge, threshold_text
from looptx_core.inspection.frontier import Point
from looptx_core.stopping.rule import RULES, SIGNALS, Exit

Document = dict[str, Any]


def stops(document: Document, trace: Document) -> dict[str, list[Document]]:
    """By rule its points from few loops to many, each with the depths of the trace's tokens.

    A point has `says`, `mean_loops`, `loss` and `increase` (percent) on held-out text, `picked`,
    and `depths`, a character for each token: the one whose code is 48 more than its loops.
    """
    choice = document["choice"]
    signals = {
        name: torch.tensor(
            [[math.inf if v is None else v for v in token["signals"][name]]
             for token in trace["tokens"]]
        ).T
        for name in SIGNALS
    }  # fmt: skip
    found = {}
    for rule in RULES:
        points = [point for point in document["frontier"] if point["rule"] == rule]
        if rule == "auto":  # two thresholds: only the better pairs are a line
            points = lower_edge(points)
        if choice["rule"] == rule:
            points.append(choice)
        points.sort(key=lambda point: (point["mean_loops"], -point["loss"]))
        if points:
            found[rule] = [
                {
                    "says": threshold_text(point),
                    "mean_loops": point["mean_loops"],
                    "loss": point["loss"],
                    "increase": 100 * (point["loss"] / choice["full_depth_loss"] - 1),
                    "picked": point is choice,
                    "depths": _depths(document, point, signals),
                }
                for point in points
            ]
    return found


def _depths(document: Document, point: Document, signals: dict[str, torch.Tensor]) -> str:
    loops, fewest = document["loops"], document["exit"].get("min_loops", 1)
    at = Point(
        point["rule"], point["threshold"], point["mean_loops"], point["loss"], 0.0, 0.0,
        point["confidence"],
    )  # fmt: skip
    own = at.settings(ExitSettings(min_loops=fewest))
    return "".join(chr(48 + n) for n in Exit(fewest, loops, own, own.rule).depths(signals).tolist())
