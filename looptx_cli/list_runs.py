"""looptx runs: what was trained here, and how far it came."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from looptx_cli.console import note, stdout

if TYPE_CHECKING:
    from looptx_core.checkpoint.run_summary import RunSummary

SCHEMA_VERSION = 1


def runs(
    folder: Annotated[Path, typer.Argument(help="The folder of the runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No notes.")] = False,
) -> None:
    """List the runs of train and finetune, those of a sweep among them, the newest first.

    \b
    looptx runs
    looptx runs elsewhere/runs
    looptx runs --json
    """
    from looptx_core.checkpoint.run_summary import list_runs

    found = list_runs(folder)
    if as_json:
        document = {"schema_version": SCHEMA_VERSION, "runs": [run.to_dict() for run in found]}
        sys.stdout.write(json.dumps(document) + "\n")
        return
    if not found:
        note(f"no runs under {folder}; looptx train makes one", quiet)
        return
    _show(found)
    for run in found:
        if run.state == "damaged":
            note(f"{run.folder} is damaged: {run.problem}", quiet)
    finished = [str(run.folder) for run in found if run.state == "finished"][:2]
    if len(finished) == 2:
        note(f"try next: looptx compare {' '.join(finished)}", quiet)


def _show(found: list[RunSummary]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold", min_width=10)
    table.add_column("command", no_wrap=True)
    table.add_column("data", overflow="fold", min_width=8)
    for name in ("steps", "best", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("state", "when"):
        table.add_column(name, no_wrap=True)
    for run in found:
        cells: list[Any] = [Text(run.name), "", "", "", "", size(run.bytes), run.state, ""]
        if run.state != "damaged":
            planned = run.planned_steps
            names = ", ".join(Path(item).name for item in run.data) or "bundled"
            of = f"/{planned:,}" if planned not in (None, run.steps) else ""
            cells[1:5] = [str(run.command), Text(names), f"{run.steps:,}{of}", best(run)]
        if run.updated:
            cells[-1] = when(datetime.fromisoformat(run.updated).astimezone())
        table.add_row(*cells)
    stdout().print(table)


def best(run: RunSummary) -> str:
    """The best held-out figure of a run, with its unit."""
    if run.best_bits_per_byte is not None:
        return f"{run.best_bits_per_byte:.3f} bits/byte"
    return "" if run.best_loss is None else f"{run.best_loss:.3f} nats"


def when(moment: datetime) -> str:
    """A time for people: as short as it can be without doubt."""
    now = datetime.now().astimezone()
    if moment.date() == now.date():
        return f"{moment:%H:%M}"
    return f"{moment:%d %b}" if moment.year == now.year else f"{moment:%Y-%m-%d}"


def size(count: int) -> str:
    """A number of bytes for people."""
    for unit, limit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= limit:
            return f"{count / limit:.0f} {unit}"
    return f"{count} B"
