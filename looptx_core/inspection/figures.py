"""A report's figures as PNG files, drawn from its document alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from looptx_core.atomic import write_file
from looptx_core.documents import printable
from looptx_core.inspection import written
from looptx_core.inspection.charts import COLOURS, Chart, charts
from looptx_core.media.base import Figure
from looptx_core.media.registry import MEDIA

Document = dict[str, Any]
FIGURES = (".png", ".svg", ".pdf")
"""The kinds of files that charts are drawn to."""
_ACROSS = 3  # charts side by side in a file of their own


def plot_figures(document: Document, folder: Path) -> dict[str, Path]:
    """Write the PNGs and return them by title."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
    from matplotlib import pyplot as plt

    plots = {
        title: Figure(f"{name}.png", partial(_side_by_side, made), len(made))
        for title, (name, made) in charts(document).items()
    }
    for medium in MEDIA.values():
        for number, found in enumerate(document[medium.plural], start=1):
            plots |= medium.figures(found, number)
    for number, found in enumerate(document["written"], start=1):
        plots |= written.figures(found, number)
    made = {}
    for title, (name, make, count) in plots.items():
        figure, axes = plt.subplots(1, count, figsize=(5 * count, 4))
        make(axes)
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)
        made[title] = folder / name
    return made


def draw_charts(made: Sequence[Chart], file: Path) -> None:
    """Charts in one figure, whose kind the file's ending tells; replaces the file.

    Raises `LooptxError` where it can't be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
    from matplotlib import pyplot as plt

    across = min(_ACROSS, len(made))
    down = -(-len(made) // across)
    figure, axes = plt.subplots(down, across, figsize=(5 * across, 4 * down), squeeze=False)
    _side_by_side(list(made), axes.flat)
    for axis in figure.axes[: len(made)]:
        axis.spines[["top", "right"]].set_visible(False)
    for axis in figure.axes[len(made) :]:
        axis.set_visible(False)
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format=file.suffix[1:].lower())
    plt.close(figure)
    write_file(file, drawn.getvalue())


def _side_by_side(made: list[Chart], axes: Any) -> None:
    for chart, axis in zip(made, axes):
        _chart(chart, axis)


def _chart(chart: Chart, axis: Any) -> None:
    for series in chart.series:
        xs = [x for x, _ in series.points]
        ys = [float("nan") if y is None else y for _, y in series.points]
        colour = COLOURS[series.colour]
        if series.bars:
            axis.bar(xs, ys, color=colour, label=printable(series.name))
        else:
            small = len(xs) > 20
            axis.plot(
                xs, ys, color=colour, marker="." if small else "o", label=printable(series.name)
            )
            if series.errors:
                axis.errorbar(xs, ys, series.errors, color=colour, linestyle="none", capsize=3)
    for level in chart.lines:
        axis.axhline(level, color="0.7", linewidth=0.8, linestyle="-" if level == 0 else "--")
    for mark in chart.marks:
        if mark.y is None:
            axis.axvline(mark.x, color="0.6", linewidth=0.8, linestyle=":", label=mark.label)
        else:
            axis.plot([mark.x], [mark.y], "*", color="black", markersize=12, label=mark.label)
    axis.set(xlabel=chart.x, ylabel=chart.y, title=printable(chart.title))
    if chart.log_y:
        axis.set_yscale("log")
    if chart.y_range:
        axis.set_ylim(*chart.y_range)
    if chart.names:
        axis.set_xticks(range(len(chart.names)), [printable(name) for name in chart.names])
    if len(chart.series) > 1 or (chart.marks and chart.series):
        axis.legend(frameon=False, fontsize=8)
