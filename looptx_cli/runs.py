"""What the commands that train share: their folder, their settings, their JSON lines."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from looptx_core.checkpoint.registry import next_run_dir
from looptx_core.config.processes import RUN, is_first, starter
from looptx_core.config.resolve import Resolved, flag_name, read_resolved, write_resolved
from looptx_core.errors import DataError, LooptxError, UsageError
from looptx_core.schema import coerce

SCHEMA_VERSION = 1
# What may change where a sharded run goes on; its checkpoints fit any of these.
_SPREAD = {"devices", "nodes", "micro_batch", "offload", "nvme_path"}


def resumed(
    folder: Path,
    flags: Mapping[str, Any],
    command: str,
    schema: type,
    sections: Mapping[str, type] | None = None,
    config: Path | None = None,
) -> Resolved:
    """The settings of an interrupted run; only a limit of time may differ, and how a sharded run
    is spread."""
    if config is not None:
        raise UsageError(
            "--config has no effect on --resume, which takes the run's own config.yaml; "
            "leave one out"
        )
    file = folder / "config.yaml"
    if not file.is_file():
        raise DataError(f"{folder}: not a run of looptx {command} (no config.yaml); check --resume")
    given = {key: value for key, value in flags.items() if value not in (None, [], ())}
    resolved = read_resolved(file, schema, sections)
    sharded = resolved.build(schema).sharding not in ("none", "ddp")
    if other := given.keys() - ({"max_minutes", *_SPREAD} if sharded else {"max_minutes"}):
        name = sorted(other)[0].replace("_", "-")
        raise UsageError(
            f"--{name} can't change on --resume, which repeats the run exactly; "
            "leave it out, or start a new run"
        )
    hints = get_type_hints(schema)
    for key in _SPREAD & given.keys():
        resolved.values[key] = coerce(given[key], hints[key], flag_name(key))
        resolved.origins[key] = flag_name(key)
    resolved.values["max_minutes"] = given.get("max_minutes")
    return resolved


def place_of(
    resume: Path | None, out: str | None, command: str, overwrite: bool
) -> tuple[Path, bool]:
    """The run's folder, and whether this process is the one that makes it.

    Raises `UsageError` where several processes start at once and can't know the folder.
    """
    if RUN in os.environ:
        return Path(os.environ[RUN]), is_first()
    if resume is not None:
        return resume, is_first()
    if starter():
        if out is None:
            raise UsageError("several processes start together; name the run's folder by --out")
        if not is_first():
            return Path(out), False
    return next_run_dir(out, command, overwrite), True


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
