"""What the commands that train share: their folder, their settings, their JSON lines."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from looptx_core.config.resolve import Resolved, read_resolved, write_resolved
from looptx_core.errors import DataError, LooptxError, UsageError

SCHEMA_VERSION = 1


def resumed(
    folder: Path,
    flags: Mapping[str, Any],
    command: str,
    schema: type,
    sections: Mapping[str, type] | None = None,
) -> Resolved:
    """The settings of an interrupted run; only a limit of time may differ."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise DataError(f"{folder}: not a run of looptx {command} (no config.yaml); check --resume")
    given = {key: value for key, value in flags.items() if value not in (None, [], ())}
    if other := given.keys() - {"max_minutes"}:
        name = sorted(other)[0].replace("_", "-")
        raise UsageError(
            f"--{name} can't change on --resume, which repeats the run exactly; "
            "leave it out, or start a new run"
        )
    resolved = read_resolved(file, schema, sections)
    resolved.values["max_minutes"] = given.get("max_minutes")
    return resolved


def settle(resolved: Resolved, values: Mapping[str, Any], origin: str) -> Resolved:
    """Put in what was found only now, such as the data's vocabulary."""
    for key, value in values.items():
        if resolved.values[key] != value:
            resolved.values[key], resolved.origins[key] = value, origin
    return resolved


def begin(folder: Path, resolved: Resolved, overwrite: bool) -> None:
    """Make the run's folder, empty but for its settings."""
    try:
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LooptxError(
            f"cannot make {folder}: {error.strerror}; choose another --out"
        ) from error
    write_resolved(folder / "config.yaml", resolved, omit={"out", "max_minutes"})


def write_line(line: str) -> None:
    """A JSON line on stdout, at once."""
    sys.stdout.write(line)
    sys.stdout.flush()


def summary(result: Any) -> str:
    """A result's last JSON line."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(result).items()}
    values["model"] = values.pop("model_folder")
    return json.dumps({"schema_version": SCHEMA_VERSION, "summary": values}) + "\n"
