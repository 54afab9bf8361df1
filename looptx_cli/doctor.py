"""looptx doctor: what is here, what each feature would use, what is missing."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from looptx_cli.console import flags_of, know_flags, note, stdout, with_flags
from looptx_core.errors import DataError

if TYPE_CHECKING:
    from looptx_core.doctor import Diagnosis
    from looptx_core.folder_check import FolderCheck


def doctor(
    build: Annotated[
        bool, typer.Option("--build", help="Build DeepSpeed's ops ahead, some minutes each.")
    ] = False,
    path: Annotated[
        Path,
        typer.Option(
            help="A run, a model, an adapter or tokenised data to check for damage; "
            "of any other folder, where swap files would go, the disk is measured."
        ),
    ] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="The report on stdout as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """See what this machine has, what each feature would use, and what is missing.

    \b
    looptx doctor
    looptx doctor --build
    looptx doctor --path /mnt/nvme --json
    looptx doctor --path runs/train-1
    """
    from looptx_core.folder_check import examine_folder

    if (checked := examine_folder(path)) is not None:
        _show_folder(checked, as_json)
        return

    from looptx_core.config.finetune import FinetuneConfig
    from looptx_core.config.run import TrainConfig
    from looptx_core.doctor import examine
    from looptx_core.parallel.deepspeed.ops import OPS, build_op, remove_stale_lock

    # What it reports on are parameters of the commands that train.
    know_flags(flags_of(f.name for schema in (TrainConfig, FinetuneConfig) for f in fields(schema)))

    def tell(line: str) -> None:
        note(line, quiet)

    for name in OPS:
        if line := remove_stale_lock(name):
            tell(line)
    seconds: dict[str, float] = {}
    if build:
        for name in OPS:
            seconds[name] = round(build_op(name, tell), 1)
    found = examine(str(path))
    if as_json:
        document = found.to_dict() | {"built_seconds": seconds}
        sys.stdout.write(with_flags(json.dumps(document)) + "\n")
        return
    _show(found)
    for name, took in seconds.items():
        stdout().print(f"{name} was ready after {took:.0f} s", soft_wrap=True)
    if not build and any(op.state != "built" for op in found.ops):
        note("try next: looptx doctor --build", quiet)


def _show_folder(found: FolderCheck, as_json: bool) -> None:
    """Print what was looked at. Raises `DataError` where a part is damaged."""
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict()) + "\n")
    else:
        words = {"ok": "whole", "undigested": "can be read, has no digest to compare with"}
        marks = {"ok": "+", "undigested": "·", "damaged": "!"}
        for part in found.parts:
            told = words.get(part.state, f"damaged: {part.detail}")
            stdout().print(f"{marks[part.state]} {part.path}: {told}", soft_wrap=True)
    if count := len(found.damaged):
        parts = f"{count} part{'s' * (count != 1)} of this {found.kind}"
        raise DataError(
            f"{found.path}: {parts} {'are' if count != 1 else 'is'} damaged; copy what is damaged "
            "again, or remove it"
        )


def _show(found: Diagnosis) -> None:
    from rich.table import Table

    out = stdout()
    marks = {"ok": "+", "missing": "-", "broken": "!", "note": "·"}
    out.print(f"looptx {found.looptx}", highlight=False)
    here = Table(title="\nHere", title_justify="left", box=None, pad_edge=False, show_header=False)
    for check in found.checks:
        here.add_row(marks[check.state], check.name, _with(check.detail, check.mend))
    out.print(here)
    ops = Table(
        title="\nDeepSpeed's compiled ops", title_justify="left", box=None, pad_edge=False,
        show_header=False,
    )  # fmt: skip
    for op in found.ops:
        ops.add_row(
            "+" if op.state == "built" else "·", op.name, with_flags(f"{op.state}; {op.purpose}")
        )
    out.print(ops)
    uses = Table(
        title="\nWhat would be used", title_justify="left", box=None, pad_edge=False,
        show_header=False,
    )  # fmt: skip
    for use in found.uses:
        text = f"{use.uses}: {use.why}" if use.ready else f"not here, {use.why}"
        uses.add_row("+" if use.ready else "-", with_flags(use.feature), _with(text, use.mend))
    out.print(uses)


def _with(detail: str, mend: str) -> str:
    return with_flags(f"{detail}; {mend}" if mend and mend not in detail else detail)
