"""A chart as SVG for a page: its colours are the page's, its points tell their numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator

from looptx_core.inspection.charts import Chart, Series

_WIDTH, _HEIGHT = 420, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 410, 14, 248


class _Scale:
    """From a chart's numbers to places in its picture."""

    def __init__(self, chart: Chart) -> None:
        self.log_y = chart.log_y
        points = [point for series in chart.series for point in series.points]
        xs = [x for x, _ in points] + [mark.x for mark in chart.marks] or [0.0]
        ys = [y for _, y in points if y is not None and (y > 0 or not chart.log_y)] or [1.0]
        bars = any(series.bars for series in chart.series)
        room = 0.6 if bars else 0.0
        self.x0, self.x1 = _wide(min(xs) - room, max(xs) + room)
        low, high = chart.y_range or (min([*ys, 0.0] if bars else ys), max(ys))
        if self.log_y:
            low, high = math.log10(low), math.log10(high)
        low, high = _wide(low, high)
        space = 0.0 if chart.y_range else 0.06 * (high - low)
        self.y0, self.y1 = low - space * (low != 0), high + space

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (_RIGHT - _LEFT)

    def y(self, value: float) -> float:
        if self.log_y:
            value = math.log10(value) if value > 0 else self.y0
        return _BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (_BOTTOM - _TOP)


def svg(chart: Chart, number: str) -> str:
    """One <svg> element with its legend. number: tells it from the page's others."""
    scale = _Scale(chart)
    parts = [*_axes(chart, scale)]
    for level in chart.lines:
        y = scale.y(level)
        style = "zero" if level == 0 else "level"
        parts.append(_line(_LEFT, y, _RIGHT, y, style))
    clip = f"clip-{number}"
    parts.append(
        f'<clipPath id="{clip}"><rect x="{_LEFT - 5}" y="{_TOP - 5}" '
        f'width="{_RIGHT - _LEFT + 10}" height="{_BOTTOM - _TOP + 10}"/></clipPath>'
        f'<g clip-path="url(#{clip})">'
    )
    bars = [series for series in chart.series if series.bars]
    for series in chart.series:
        parts += _bars(series, scale) if series in bars else _curve(chart, series, scale)
    parts.append("</g>")
    for mark in chart.marks:
        x, label = scale.x(mark.x), html.escape(mark.label)
        end = ' text-anchor="end"' if x > (_LEFT + _RIGHT) / 2 else ""
        side = -6 if end else 6
        if mark.y is None:
            parts.append(_line(x, _TOP, x, _BOTTOM, "mark"))
            parts.append(f'<text x="{x + side:.1f}" y="{_TOP + 8}"{end}>{label}</text>')
        else:
            y = scale.y(mark.y)
            tip = _tip(chart, mark.label, mark.x, mark.y)
            parts.append(
                f'<circle class="picked" cx="{x:.1f}" cy="{y:.1f}" r="6" data-tip="{tip}"/>'
                f'<text class="strong" x="{x + 2 * side:.1f}" y="{y - 8:.1f}"{end}>{label}</text>'
            )
    title = html.escape(chart.title)
    span = ",".join(f"{v:.6g}" for v in (scale.x0, scale.x1, scale.y0, scale.y1))
    legend = ""
    if len(chart.series) > 1:
        names = (f'<span class="c{s.colour}">{html.escape(s.name)}</span>' for s in chart.series)
        legend = f'<figcaption class="legend">{"".join(names)}</figcaption>'
    return (
        f'<figure><h3>{title}</h3><svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{title}" data-span="{span}" data-plot="{_LEFT},{_RIGHT},{_TOP},{_BOTTOM}">'
        f"{''.join(parts)}</svg>{legend}</figure>"
    )


def _axes(chart: Chart, scale: _Scale) -> Iterator[str]:
    for value in _ticks(scale.y0, scale.y1, 5, whole=scale.log_y):
        shown = f"{10**value:g}" if scale.log_y else f"{value:g}"
        y = scale.y(10**value if scale.log_y else value)
        yield _line(_LEFT, y, _RIGHT, y, "grid")
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>'
    places: list[tuple[float, str]] = [*enumerate(chart.names)] or [
        (value, f"{value:g}")
        for value in _ticks(scale.x0, scale.x1, 10, whole=scale.x1 - scale.x0 > 3)
    ]
    for value, name in places:
        yield (
            f'<text x="{scale.x(value):.1f}" y="{_BOTTOM + 17}" text-anchor="middle">'
            f"{html.escape(name)}</text>"
        )
    middle = (_LEFT + _RIGHT) / 2
    yield (
        f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(chart.x)}</text>'
        f'<text transform="translate(12 {(_TOP + _BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(chart.y)}</text>'
    )


def _curve(chart: Chart, series: Series, scale: _Scale) -> Iterator[str]:
    steps, pen = [], "M"
    for x, y in series.points:
        if y is None:
            pen = "M"
            continue
        steps.append(f"{pen}{scale.x(x):.1f} {scale.y(y):.1f}")
        pen = "L"
    yield f'<path class="c{series.colour}" d="{"".join(steps)}"/>'
    radius = 2 if len(series.points) > 20 else 3.5
    tips = series.tips or [""] * len(series.points)
    for (x, y), more in zip(series.points, tips):
        if y is not None:
            tip = _tip(chart, series.name, x, y, more)
            yield (
                f'<circle class="c{series.colour}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" '
                f'r="{radius}" data-tip="{tip}"/>'
            )


def _bars(series: Series, scale: _Scale) -> Iterator[str]:
    zero, half = scale.y(0), 0.35 * (scale.x(1) - scale.x(0))
    for x, y in series.points:
        top = scale.y(y or 0.0)
        yield (
            f'<rect class="c{series.colour}" x="{scale.x(x) - half:.1f}" y="{min(top, zero):.1f}" '
            f'width="{2 * half:.1f}" height="{max(1.0, abs(top - zero)):.1f}" '
            f'data-tip="{html.escape(series.name)}: {abs(y or 0.0):.4g}"/>'
        )


def _tip(chart: Chart, name: str, x: float, y: float, more: str = "") -> str:
    parts = [name, more, f"{chart.x} {x:.4g}", f"{chart.y} {y:.4g}"]
    return html.escape("\n".join(part for part in parts if part))


def _line(x0: float, y0: float, x1: float, y1: float, style: str) -> str:
    return f'<line class="{style}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def _ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers within a range."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]


def _wide(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)
