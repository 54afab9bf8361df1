"""`run.json`: what a run's folder says about the run, beside its settings in config.yaml.

It marks the folder as the command's own, which alone may replace it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import looptx_core
from looptx_core.checkpoint.atomic import write_file
from looptx_core.documents import read_json, to_json
from looptx_core.errors import DataError

FILE = "run.json"
FORMAT_VERSION = 1


def begin_run(
    folder: Path, command: str, target: Path | None = None, origin: Mapping[str, str] | None = None
) -> None:
    """Write the facts of a new run.

    target: the folder whose place it takes once it is whole. origin: fingerprints of what it is
    made from, by name, such as `data`.
    """
    facts = {
        "command": command,
        "format_version": FORMAT_VERSION,
        "looptx_version": looptx_core.__version__,
        "replaces": target.resolve().name if target else None,
        "origin": dict(origin or {}),
    }
    write_file(folder / FILE, to_json(facts))


def read_facts(folder: Path) -> dict[str, Any]:
    """A run's facts; none where it has no `run.json`. Raises `DataError` for a damaged one."""
    return read_json(folder / FILE) if (folder / FILE).is_file() else {}


def update_facts(folder: Path, **facts: Any) -> None:
    """Put more facts into a run's `run.json`."""
    write_file(folder / FILE, to_json({**read_facts(folder), **facts}))


def replaces(folder: Path) -> Path | None:
    """The folder beside whose place a run takes once it is whole."""
    name, here = read_facts(folder).get("replaces"), folder.resolve()
    if not isinstance(name, str) or here.name != f"{name}.new":
        return None
    return (folder if folder.name == here.name else here).with_name(name)


def check_origin(folder: Path, origin: Mapping[str, str]) -> None:
    """Raise `DataError` where a run was made from something else than what is there now."""
    then = read_facts(folder).get("origin")
    for name, value in origin.items():
        if isinstance(then, dict) and then.get(name, value) != value:
            raise DataError(
                f"{folder}: the {name} is not what this run began with, so it can't go on; put "
                f"the {name} of then back, or start a new run"
            )
