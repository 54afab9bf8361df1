"""`run.json`: what a run's folder says about the run, beside its settings in config.yaml.

It marks the folder as the command's own, which alone may replace it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import looptx_core
from looptx_core.atomic import write_file
from looptx_core.config.resolve import recorded
from looptx_core.documents import read_json, to_json
from looptx_core.errors import DataError, UsageError
from looptx_core.schema import typed

FILE = "run.json"
FORMAT_VERSION = 1
_MEND = "restore it, or start a new run"


@dataclass(frozen=True)
class _Facts:
    """The types of what `run.json` holds."""

    command: str | None = None
    format_version: int | None = None
    looptx_version: str | None = None
    replaces: str | None = None
    origin: dict[str, str] = field(default_factory=dict)
    until: int | None = None
    """The last step of a run that goes on beyond its settings."""
    finished: int | None = None
    """The steps of a whole run."""
    exact_match: float | None = None
    """The share of held-out prompts that a finetuned model answers exactly as expected."""
    answered: int | None = None
    """How many such prompts were asked."""

    def __post_init__(self) -> None:
        for name, steps in (("until", self.until), ("finished", self.finished)):
            if steps is not None and steps < 0:
                raise UsageError(f"{name}: expected a number of steps, not {steps}")


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
    file = folder / FILE
    if not file.is_file():
        return {}
    found = read_json(file, mend=_MEND)
    facts = asdict(typed(_Facts, found, str(file), mend=_MEND, ignore_unknown=True))
    return found | {key: value for key, value in facts.items() if key in found}


def run_command(folder: Path) -> str:
    """The command, 'train' or 'finetune', that made a run, which has a `config.yaml`.

    Raises `DataError` for a damaged `run.json` or `config.yaml`.
    """
    command = read_facts(folder).get("command")
    if command in ("train", "finetune"):
        return str(command)
    # Only a finetuning names its model; a training describes it.
    return "finetune" if isinstance(recorded(folder / "config.yaml", "model"), str) else "train"


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
                f"back the {name} it began with, or start a new run"
            )
