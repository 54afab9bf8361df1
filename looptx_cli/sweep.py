"""looptx sweep: a grid of settings, each trained with several seeds."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from looptx_cli.console import note, stdout, with_flags
from looptx_cli.imports import large_imports
from looptx_cli.tables import show_rows
from looptx_core.atomic import write_file
from looptx_core.checkpoint.registry import RUNS
from looptx_core.config.run import TrainConfig
from looptx_core.config.sweep import FILE, Cell, Grid, read_grid, shown
from looptx_core.documents import read_json, some, to_json
from looptx_core.errors import Interrupted, LooptxError, UsageError
from looptx_core.words import counted

if TYPE_CHECKING:
    from looptx_core.inspection.sweep import Document

FIGURE = "sweep.png"
_VARIES = object()
"""In place of a value: of a key that has several."""


def sweep(
    grid: Annotated[
        Path,
        typer.Argument(
            help="A YAML file: keys of looptx train, each with a list of values, and seeds."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The folder of the runs; absent: runs/sweep-<GRID's name>.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no notes.")] = False,
) -> None:
    """Train every combination of a grid's values, with several seeds.

    \b
    looptx sweep grid.yaml
    looptx sweep grid.yaml --dry-run
    looptx sweep grid.yaml --out runs/lr

    The same command goes on: a run that has finished is not repeated, one that was stopped is
    resumed. A grid is such as

    \b
    seeds: [0, 1, 2]
    lr: [0.005, 0.01, 0.02]
    model: {core_layers: [1, 2]}
    steps: 300
    """  # fmt: skip
    found = read_grid(grid)
    folder = out or RUNS / f"sweep-{grid.stem}"
    _check_folder(folder, grid, found)
    with large_imports():
        from looptx_core.inspection.figures import draw_charts
        from looptx_core.inspection.sweep import sweep_chart, sweep_document

    runs = [cell for cells in found.cells for cell in cells]
    if dry_run:
        document = sweep_document(found, folder, {})
        if as_json:
            _print(document)
        else:
            _show_plan(found, document)
        return
    file = folder / FILE
    write_file(file, to_json({"command": "sweep", **sweep_document(found, folder, {})}),
               parents=True)  # fmt: skip
    errors: dict[str, str] = {}
    try:
        for number, cell in enumerate(runs, 1):
            _run(cell, folder, f"{number} of {len(runs)}", errors, quiet)
    finally:  # what was reached until an interrupt, too
        document = sweep_document(found, folder, errors)
        write_file(file, to_json({"command": "sweep", **document}))
    draw_charts([sweep_chart(found, document)], folder / FIGURE)
    if as_json:
        _print(document)
    else:
        _show(found, document)
    note(f"table: {file}, chart: {folder / FIGURE}", quiet)
    if errors:
        raise LooptxError(
            f"{len(errors)} of {counted(len(runs), 'run')} failed, as told above; the same command "
            "tries them again"
        )


def _check_folder(folder: Path, file: Path, grid: Grid) -> None:
    """Raise `UsageError` for a folder that holds something else than a sweep of these keys and
    fixed settings, and where the grid's own file would be written over."""
    root, end = folder.resolve(), file.resolve()
    names = {FILE, FIGURE, *(cell.name for cells in grid.cells for cell in cells)}
    if any(end.is_relative_to(root / name) for name in names):
        raise UsageError(f"{file} stands where the sweep writes; move it, or choose another --out")
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    written: dict[str, Any] = {}
    with contextlib.suppress(LooptxError):
        written = read_json(folder / FILE)
    match written:
        case {"command": "sweep", "fixed": dict(fixed), "rows": [{"settings": dict(varied)}, *_]}:
            then = fixed | dict.fromkeys(varied, _VARIES)
        case _:
            raise UsageError(f"{folder} is there and holds no sweep; choose another --out")
    now = json.loads(json.dumps(grid.fixed)) | dict.fromkeys(grid.axes, _VARIES)
    same = {key for key in then.keys() & now.keys() if then[key] == now[key]}
    if others := sorted((then.keys() | now.keys()) - same):
        raise UsageError(
            f"{folder} holds the sweep of another grid, by {some(others)}; choose another --out"
        )


def _run(cell: Cell, folder: Path, place: str, errors: dict[str, str], quiet: bool) -> None:
    """Train it, or go on with it, unless it has finished; an error is told and noted."""
    from looptx_core.inspection.sweep import final_loss

    run = folder / cell.name
    said = ", ".join(f"{key} {shown(value)}" for key, value in cell.varied.items())
    said = f"{place}: {said}{said and ', '}seed {cell.seed}"
    loss = final_loss(run)
    if loss is not None:
        note(f"{said}: finished before, {loss:.4f}", quiet)
        return
    note(said, quiet)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a run's own table
            _train(cell, run)
    except (Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever ends a run, the others go on
        kind = "" if isinstance(error, LooptxError) else f"{type(error).__name__}: "
        errors[cell.name] = " ".join(f"{kind}{with_flags(str(error))}".split())
        note(f"{said}: failed, {errors[cell.name]}")
        return
    loss = final_loss(run)
    if loss is None:
        errors[cell.name] = f"its steps are done and {run} holds no result; remove that folder"
        note(f"{said}: failed, {errors[cell.name]}")
        return
    note(f"{said}: {loss:.4f} nats a token", quiet)


def _train(cell: Cell, run: Path) -> None:
    """What `looptx train` does with these settings, in this process."""
    from looptx_cli.train import train

    flags: dict[str, Any] = dict.fromkeys(field.name for field in fields(TrainConfig))
    resume = run if (run / "config.yaml").is_file() else None
    if resume is None:
        flags |= {key: value for key, value in cell.settings.items() if "." not in key}
        flags["out"] = str(run)
    pairs = [f"{key}={_text(value)}" for key, value in cell.settings.items()
             if "." in key and value is not None and resume is None]  # fmt: skip
    train(
        **flags, set_=pairs, config=None, memory=None, resume=resume, overwrite=False,
        dry_run=False, force=False, as_json=False, quiet=True,
    )  # fmt: skip


def _text(value: Any) -> str:
    """As --set reads it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _print(document: Document) -> None:
    sys.stdout.write(json.dumps(document) + "\n")


def _show_plan(grid: Grid, document: Document) -> None:
    rows = []
    for run in document["runs"]:
        values = [shown(run["settings"][key]) for key in grid.axes]
        rows.append([Path(run["folder"]).name, *values, str(run["seed"]), run["state"]])
    show_rows(("run", *grid.axes, "seed", "state"), rows)
    left = sum(run["state"] != "finished" for run in document["runs"])
    stdout().print(
        f"{counted(len(document['runs']), 'run')} in {document['out']}, {left:,} of them to train",
        soft_wrap=True, markup=False,
    )  # fmt: skip


def _show(grid: Grid, document: Document) -> None:
    from looptx_core.inspection.sweep import best_row

    stdout().print("Held-out loss at the last loop, nats a token:", soft_wrap=True)
    best, rows = best_row(document), []
    for number, row in enumerate(document["rows"]):
        mean, half = row["mean_loss"], row["interval"]
        rows.append([
            *(shown(row["settings"][key]) for key in grid.axes),
            f"{row['seeds']} of {len(grid.seeds)}",
            "-" if mean is None else f"{mean:.4f}",
            "-" if half is None else f"± {half:.4f}",
            "best" if number == best and len(document["rows"]) > 1 else "",
        ])  # fmt: skip
    figures = ("seeds", "mean", "95 %", "")
    show_rows((*grid.axes, *figures), rows, right=figures)
