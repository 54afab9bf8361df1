"""looptx runs: what was trained here, and how far it came."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from looptx_cli.console import note
from looptx_cli.tables import show_rows
from looptx_core.words import quoted

if TYPE_CHECKING:
    from looptx_core.checkpoint.run_summary import RunSummary

SCHEMA_VERSION = 1
_NAMED = 2  # data sets of a run


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
    finished = [quoted(run.folder) for run in found if run.state == "finished"][:2]
    if len(finished) == 2:
        note(f"try next: looptx compare {' '.join(finished)}", quiet)


def _show(found: list[RunSummary]) -> None:
    rows = []
    for run in found:
        cells = [run.name, "", "", "", "", size(run.bytes), run.state, ""]
        if run.state != "damaged":
            planned = run.planned_steps
            of = f"/{planned:,}" if planned not in (None, run.steps) else ""
            cells[1:5] = [str(run.command), _names(run.data), f"{run.steps:,}{of}", best(run)]
        if run.updated:
            cells[-1] = when(datetime.fromisoformat(run.updated).astimezone())
        rows.append(cells)
    head = ("run", "command", "data", "steps", "best", "size", "state", "when")
    show_rows(head, rows, right=("steps", "best", "size"))


def _names(data: Sequence[str]) -> str:
    """The first names of what a run was trained on, and how many there are besides."""
    names = [Path(item).name for item in data] or ["bundled"]
    more = f", {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


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
