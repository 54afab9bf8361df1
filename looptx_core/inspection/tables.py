"""A table as text for other tools: CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from typing import Any

Table = tuple[list[str], list[list[Any]]]
"""The names of the columns, and the values of each row."""


def as_csv(table: Table) -> str:
    """With full precision; an empty cell where there is no value."""
    head, rows = table
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return out.getvalue()


def as_markdown(table: Table) -> str:
    """A table of GitHub's Markdown, numbers to the right."""

    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    def escaped(text: str) -> str:
        return re.sub(r"([\\|*_`<\[])", r"\\\1", " ".join(text.split()))

    head, rows = table
    rule = [":---", *("---:" for _ in head[1:])]
    body = [[escaped(cell(value)) for value in row] for row in rows]
    return line([escaped(name) for name in head]) + line(rule) + "".join(map(line, body))


def as_latex(table: Table) -> str:
    """A `tabular` with the rules of the package booktabs."""
    head, rows = table
    lines = [
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(map(_latex, head)) + r" \\",
        r"\midrule",
        *(" & ".join(_latex(cell(value)) for value in row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[Table], str]] = {
    "csv": as_csv,
    "markdown": as_markdown,
    "latex": as_latex,
}


def cell(value: Any) -> str:
    """A value for people: four digits after a number's point, or an exponent for large ones."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        if value and not 1e-3 <= abs(value) < 1e7:
            return f"{value:.3g}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
