"""Tokens on a terminal: their depth as a colour, their figures as lines and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from looptx_core.data.hops import check_answers
from looptx_core.documents import printable
from looptx_core.words import counted

if TYPE_CHECKING:
    from looptx_core.generation.engine import Generation, Step

# From shallow to deep; told apart by brightness too, for those who see no hues.
_COLOURS = ("grey74", "sky_blue1", "spring_green2", "yellow1", "dark_orange", "red1")


def depth_colour(loops: int, deepest: int) -> str:
    """Rich's name of a depth's colour; the first loops differ most, as few tokens go far."""
    share = math.log(loops) / math.log(max(2, deepest))
    return _COLOURS[min(len(_COLOURS) - 1, int(share * len(_COLOURS)))]


def token_line(step: Step) -> str:
    """A token as one plain line: loops, confidence, text."""
    return f"{step.loops:>3}  {step.confidence:5.3f}  {step.text!r}"


class TokenDisplay:
    """Tokens in the colours of their depths as they come, and under each line their figures.

    A token takes a cell as wide as its figures, which stand in two rows under it: its loops, and
    its confidence in percent. The prompt's last pass predicts the first token, so that the first
    token's depth is the prompt's: it is marked and has no colour.
    """

    def __init__(self, console: Console, deepest: int, before: str = "") -> None:
        """before: the text that stands on the terminal when the first token comes."""
        self.console, self.deepest = console, deepest
        last = cell_len(before.rsplit("\n", 1)[-1]) % console.width
        self._breaks_first = last > console.width // 2
        self._indent = 0 if self._breaks_first else last
        self._cells: list[tuple[int, Text, Text]] = []
        self._first = True

    def add(self, step: Step) -> None:
        """Print one more token."""
        if self._first and self._breaks_first:
            self.console.print()
        text = _visible(step)
        mark = "*" if self._first else ""
        style = "bold" if self._first else depth_colour(step.loops, self.deepest)
        loops, sure = f"{step.loops}{mark}", f"{100 * step.confidence:.0f}"
        width = max(cell_len(text), len(loops) + 1, len(sure) + 1)
        if self._cells and self._column + width >= self.console.width:
            self._end_line()
        self._first = False
        self._cells.append((width, Text(loops, style=f"dim {style}"), Text(sure, style="dim")))
        self.console.print(_right(Text(text, style=style), width), end="", soft_wrap=True)
        if "\n" in step.text:
            self._end_line()

    def close(self) -> None:
        """Print the figures of the last line."""
        if self._cells:
            self._end_line()

    @property
    def _column(self) -> int:
        return self._indent + sum(width for width, *_ in self._cells)

    def _end_line(self) -> None:
        self.console.print()
        for row, name in ((1, "loops"), (2, "sure %")):
            label = name if len(name) < self._indent else ""
            line = Text(label.rjust(self._indent), style="dim")
            for cell in self._cells:
                line.append_text(_right(cell[row], cell[0]))  # type: ignore[arg-type]
            self.console.print(line, soft_wrap=True)
        self._cells, self._indent = [], 0


def _right(text: Text, width: int) -> Text:
    return Text(" " * (width - text.cell_len)).append_text(text)


def _visible(step: Step) -> str:
    """A token on one line of a terminal: what has no picture is written out."""
    if not step.text:
        return " <end>" if step.finish_reason == "end" else "…"
    text = step.text.replace("\n", "↵")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def legend(result: Generation, deepest: int) -> Text:
    """Which colour means which depth, how many tokens went there, and what the figures are."""
    first, *others = result.tokens
    text = Text("\n")
    for loops in sorted({step.loops for step in others}):
        count = sum(step.loops == loops for step in others)
        text.append(counted(loops, "loop"), style=depth_colour(loops, deepest))
        text.append(f" x{count}  ")
    text.append("under each token its loops and its confidence in %\n", style="dim")
    return text.append(
        f"* comes from the prompt, which ran {counted(first.loops, 'loop')} "
        "whatever the token needs",
        style="dim",
    )


def compute_told(saved: float) -> str:
    """What the exits saved of full depth's compute, a share; below 0 they took more."""
    if saved < -0.005:
        return f"{1 - saved:.1f} times full depth's compute"
    return f"{abs(saved):.0%} of full depth's compute saved"


def answers_told(prompt: str, continuation: str) -> str | None:
    """How many answers on a table of arrows are right, where the text has such a table."""
    found = check_answers(prompt, continuation)
    if found is None:
        return None
    right, asked = found
    if right == asked:
        return f"all {asked} answers are right" if asked > 1 else "the answer is right"
    return f"{right} of {asked} answers are right"


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
