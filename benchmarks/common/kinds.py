"""Loops and confidence by the kind of a token."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.common.record import Row
from benchmarks.common.tables import percent, table
from looptx_core.generation.request import Generation, Step


def by_kind(kinds: Mapping[str, Sequence[Step]]) -> list[Row]:
    """A row for each kind that there is: its mean loops and confidence."""
    return [
        {
            "kind": kind,
            "tokens": len(steps),
            "mean_loops": statistics.mean(step.loops for step in steps),
            "confidence": statistics.mean(step.confidence for step in steps),
        }
        for kind, steps in kinds.items()
        if steps
    ]


def words_by_kind(found: Iterable[Generation]) -> list[Row]:
    """Of tokens that begin a word, go on with one, and end the text."""
    kinds: dict[str, list[Step]] = {"begins a word": [], "within a word": [], "ends the text": []}
    for generation in found:
        for place, step in enumerate(generation.tokens):
            begins = place == 0 or step.text.startswith(" ")
            kind = "begins a word" if begins else "within a word"
            kinds[kind if step.text else "ends the text"].append(step)
    return by_kind(kinds)


def kinds_table(rows: Iterable[Row], column: str, columns: Sequence[str]) -> str:
    """Kinds down and columns across, each cell with mean loops and confidence; '' without any."""
    cells = {
        (row["kind"], row[column]): f"{row['mean_loops']:.2f}, {percent(row['confidence'])}"
        for row in rows
        if "mean_loops" in row and "kind" in row
    }
    kinds = dict.fromkeys(kind for kind, _ in cells)
    lines = [[kind, *(cells.get((kind, name), "") for name in columns)] for kind in kinds]
    if not lines:
        return ""
    return f"""\
By the kind of a token, where each stops by the model's own exit, its mean loops and its mean
confidence:

{table(["", *columns], lines)}

"""
