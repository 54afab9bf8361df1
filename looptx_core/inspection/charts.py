"""A report's charts as data: what is drawn, in numbers; `figures` and `svg` draw them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]
Points = Sequence[tuple[float, float | None]]

COLOURS = ("#2f6fd0", "#d9730d", "#1f9254", "#c93a3a", "#8457c7", "#8a6248", "#c04f9b", "#555555")
"""Told apart on white; a page in the dark lightens them."""
FIXED = 7
"""The index of the colour of fixed depths."""
RULE_COLOURS = {
    "auto": 0, "confidence": 1, "gain": 2, "kl": 3, "entropy": 4, "maxprob": 5, "change": 6,
    "fixed": FIXED,
}  # fmt: skip
_BAND = 8
"""So many times the allowed rise of the loss is what a frontier shows."""


@dataclass(frozen=True)
class Series:
    """One line, or one set of bars."""

    name: str
    points: Points
    """(x, y); where y is None there is a gap."""
    colour: int = 0
    """Index in `COLOURS`."""
    bars: bool = False
    tips: Sequence[str] = ()
    """What a point tells when pointed at, beside its series and numbers."""
    errors: Sequence[float] = ()
    """Half the length of each point's error bar, in a file's figure."""


@dataclass(frozen=True)
class Mark:
    """A point with a label, or without a y a vertical line."""

    x: float
    label: str
    y: float | None = None


@dataclass(frozen=True)
class Chart:
    """One pair of axes."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    y_range: tuple[float, float] | None = None
    """None: what the series need."""
    log_y: bool = False
    names: Sequence[str] = ()
    """In place of numbers on the x axis, at 0, 1, …"""
    marks: Sequence[Mark] = ()
    lines: Sequence[float] = ()
    """Horizontal lines at these y."""


def charts(document: Document) -> dict[str, tuple[str, list[Chart]]]:
    """By heading: the file's name without a suffix, and the charts side by side."""
    found = {
        "What each loop brings": ("loops", _loops(document)),
        "When to stop": ("frontier", _frontier(document)),
        "The confidence where tokens stop": ("confidence", _confidence(document)),
    }
    if document["tasks"]:
        found["Lines that need depth"] = ("tasks", _tasks(document))
    return found


def lower_edge(points: Iterable[Document], key: str = "mean_loops") -> list[Document]:
    """Those points that no cheaper one equals in loss, from the cheapest on."""
    best: list[Document] = []
    for point in sorted(points, key=lambda p: (p[key], p["loss"])):
        if not best or point["loss"] < best[-1]["loss"]:
            best.append(point)
    return best


def _from(first: int, values: Iterable[float | None], factor: float = 1.0) -> Points:
    return [(n, v if v is None else factor * v) for n, v in enumerate(values, start=first)]


def _loops(document: Document) -> list[Chart]:
    fixed, broken = document["fixed_by_loop"], document["broken_by_loop"]
    return [
        Chart("Held-out text", "loop", "bits per byte",
              [Series("bits per byte", _from(1, document["bits_per_byte_by_loop"]))]),
        Chart("Answers that the loop changed", "loop", "% of tokens",
              [Series("mended", _from(2, fixed, 100), 2, bars=True),
               Series("broken", _from(2, broken, -100), 3, bars=True)], lines=(0,)),
        Chart("How far the loop moves the state", "loop", "log scale",
              [Series("|change| / |state|", _from(2, document["state_change_by_loop"])),
               Series("KL to the loop before, nats", _from(2, document["kl_by_loop"]), 1)],
              log_y=True),
    ]  # fmt: skip


def _confidence(document: Document) -> list[Chart]:
    named = (("reliability_before", "before calibration", "ece_before", 1),
             ("reliability", "calibrated", "ece", 0))  # fmt: skip
    reliability = [Series("perfect", [(0, 0), (1, 1)], FIXED)] + [
        Series(f"{name}, ECE {document[error]:.3f}",
               [(b["confidence"], b["accuracy"]) for b in document[key]], colour,
               tips=[f"{b['tokens']:,} tokens" for b in document[key]])
        for key, name, error, colour in named
    ]  # fmt: skip
    rows = document["confidence_by_loop"]
    ranked = [
        Series(name, _from(1, (row[key] for row in rows)), colour)
        for key, name, colour in (("auroc", "stated", 0), ("auroc_head", "by the head alone", 1),
                                  ("auroc_maxprob", "max-probability", 5))
    ]  # fmt: skip
    return [
        Chart("Is it as often right as it says?", "confidence", "accuracy", reliability, (0, 1)),
        Chart("Does it know which answers are right?", "loop", "AUROC", ranked),
    ]


def _frontier(document: Document) -> list[Chart]:
    """Every rule; the oracle is a line of its own, as its scale would flatten the others."""
    choice = document["choice"]
    full, allowed = choice["full_depth_loss"], 100 * choice["target_loss_increase"]

    def above(point: Document) -> float:
        return 100 * (point["loss"] / full - 1)

    rules = [rule for rule in RULE_COLOURS if any(p["rule"] == rule for p in document["frontier"])]
    others = [above(p) for p in document["frontier"] if p["rule"] != "oracle"]
    top = max(min(max(others), _BAND * allowed), 2 * allowed, 0.2)
    span = (min(min(others), -0.05 * top), 1.05 * top)
    made = []
    for key, label, title in (("mean_loops", "mean loops", "Exit rules by loops"),
                              ("flops", "computing, share of full depth",
                               "The same by computing")):  # fmt: skip
        series = []
        for rule in rules:
            edge = lower_edge((p for p in document["frontier"] if p["rule"] == rule), key)
            series.append(
                Series(rule, [(p[key], above(p)) for p in edge], RULE_COLOURS[rule],
                       tips=[threshold_text(p) for p in edge])
            )  # fmt: skip
        marks = []
        if choice["oracle"]:
            marks.append(Mark(choice["oracle"][key], f"oracle, {choice['oracle'][key]:.2f}"))
        if choice["rule"] is not None:
            marks.append(Mark(choice[key], "picked", above(choice)))
        made.append(
            Chart(title, label, "loss above full depth, %", series, span,
                  marks=marks, lines=(0, allowed))
        )  # fmt: skip
    return made


def threshold_text(point: Document) -> str:
    """Where a rule's point stops, in words."""
    rule, threshold = point["rule"], f"{point['threshold']:.4g}"
    if rule == "fixed":
        return f"every token runs {threshold} loops"
    if rule == "auto":
        return f"confidence from {point['confidence']:.4g}, or gain below {threshold}"
    return f"{rule} {'from' if rule in ('confidence', 'maxprob') else 'below'} {threshold}"


def _tasks(document: Document) -> list[Chart]:
    tasks = document["tasks"]
    names = [task["name"] for task in tasks]
    by_loop = [
        Series(name, _from(1, task["accuracy_by_loop"], 100), number % FIXED)
        for number, (name, task) in enumerate(zip(names, tasks))
    ]
    depths = [(n, task["mean_loops"]) for n, task in enumerate(tasks)]
    return [
        Chart("Answers that are right", "loop", "%", by_loop),
        Chart("Depth that the exit chose", "", "mean loops",
              [Series("mean loops", depths, bars=True)], names=names),
    ]  # fmt: skip
