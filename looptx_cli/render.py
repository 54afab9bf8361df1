"""Tokens on a terminal: their depth as a colour, their figures as lines and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from looptx_core.documents import printable

if TYPE_CHECKING:
    from looptx_core.generation.engine import Generation, Step

# From shallow to deep; told apart by brightness too, for those who see no hues.
_COLOURS = ("grey74", "sky_blue1", "spring_green2", "yellow1", "dark_orange", "red1")


def depth_colour(loops: int, deepest: int) -> str:
    """Rich's name of a depth's colour."""
    share = (loops - 1) / max(1, deepest - 1)
    return _COLOURS[min(len(_COLOURS) - 1, int(share * len(_COLOURS)))]


def token_text(step: Step, deepest: int) -> Text:
    """A token in the colour of its depth, its loop count and confidence behind it."""
    text = Text(printable(step.text, keep="\n\t"), style=depth_colour(step.loops, deepest))
    return text.append(f"[{step.loops}·{step.confidence:.0%}]", style="dim")


def token_line(step: Step) -> str:
    """A token as one plain line: loops, confidence, text."""
    return f"{step.loops:>3}  {step.confidence:5.3f}  {step.text!r}"


def legend(result: Generation, deepest: int) -> Text:
    """Which colour means which depth, and how many tokens went there."""
    text = Text("\n[loops·confidence]  ", style="dim")
    for loops in sorted({step.loops for step in result.tokens}):
        count = sum(step.loops == loops for step in result.tokens)
        text.append(f"{loops} loops", style=depth_colour(loops, deepest)).append(f" x{count}  ")
    return text


def comparison(prompt: str, results: Mapping[int, Generation]) -> Table:
    """The continuations of one prompt at several depths."""
    table = Table(title=Text(printable(prompt, keep="\n\t")), title_justify="left")
    table.add_column("loops", justify="right")
    table.add_column("continuation")
    table.add_column("confidence", justify="right")
    table.add_column("log-probability", justify="right")
    table.add_column("tokens/s", justify="right")
    for loops, result in results.items():
        count = len(result.tokens)
        table.add_row(
            str(loops),
            Text(printable(result.text, keep="\n\t")),
            f"{sum(step.confidence for step in result.tokens) / count:.3f}",
            f"{sum(step.logprob for step in result.tokens) / count:.2f}",
            f"{result.tokens_per_second:.0f}",
        )
    return table
