"""Rows of figures with a name each, on standard output; no name is broken."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from looptx_cli.console import stdout
from looptx_core.documents import printable


def show_rows(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()
) -> None:
    """Print cells below their heads; the first of each row is its name.

    A pipe or a file gets a line for each row. On a terminal that is too narrow for them, the name
    stands on a line of its own, above the other cells. right: the heads of columns of numbers.
    """
    from rich.cells import cell_len
    from rich.text import Text

    lines = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines)]
    out = stdout()
    apart = out.is_terminal and sum(widths) + len(widths) - 1 > out.width
    for number, line in enumerate(lines):
        cells = [
            " " * (width - cell_len(cell)) + cell if name in right
            else cell + " " * (width - cell_len(cell))
            for name, cell, width in zip(head, line, widths)
        ]  # fmt: skip
        texts = [line[0], "  " + " ".join(cells[1:])] if apart else [" ".join(cells)]
        for text in filter(None, map(str.rstrip, texts)):
            out.print(Text(text, style="" if number else "bold"), soft_wrap=True)
