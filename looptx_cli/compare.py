"""looptx compare: runs side by side, as a table and as curves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from looptx_cli.console import note, stdout
from looptx_cli.options import check_figure
from looptx_core.errors import UsageError

if TYPE_CHECKING:
    from looptx_core.inspection.tables import Table


def compare(
    runs: Annotated[list[Path], typer.Argument(help="The folders of the runs.")],
    format: Annotated[
        str | None,
        typer.Option(help="The table for other tools.", metavar="csv | markdown | latex"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Draw curves and frontiers to this .png, .svg or .pdf.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No notes.")] = False,
) -> None:
    """Compare runs: what they reached, and the settings in which they differ.

    \b
    looptx compare runs/train-1 runs/train-2
    looptx compare runs/train-* --out curves.svg
    looptx compare runs/train-1 runs/train-2 --format latex

    Frontiers of early exits are drawn for the runs that inspect-loops has measured.
    """
    from looptx_core.inspection.compare import compare, plot_comparison, table
    from looptx_core.inspection.tables import FORMATS

    if format is not None and format not in FORMATS:
        raise UsageError(f"--format {format}: give one of {', '.join(FORMATS)}")
    if format and as_json:
        raise UsageError("--format and --json: give one of them")
    if out is not None:
        check_figure(out, overwrite)
    document = compare(runs)
    if out is not None:
        plot_comparison(document, out)
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
    elif format:
        sys.stdout.write(FORMATS[format](table(document)))
    else:
        _show(table(document))
    if out is not None:
        note(f"figure: {out}", quiet)
    else:
        note("try next: --out curves.svg", quiet)


def _show(table: Table) -> None:
    """A column for each run, as a terminal is not wide and there are many figures."""
    from rich.table import Table as Shown
    from rich.text import Text

    from looptx_core.inspection.tables import cell

    head, rows = table
    shown = Shown(box=None, pad_edge=False)
    shown.add_column("", no_wrap=True)
    for row in rows:
        shown.add_column(Text(cell(row[0])), justify="right", overflow="fold")
    for place, name in enumerate(head[1:], start=1):
        shown.add_row(name, *(Text(cell(row[place])) for row in rows))
    stdout().print(shown)
