"""What the commands that train share: their folder, their settings, their JSON lines."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from looptx_core.checkpoint.registry import RUNS, next_run_dir, take_number
from looptx_core.checkpoint.run_facts import begin_run, replaces
from looptx_core.config.processes import RUN, is_first, starter
from looptx_core.config.resolve import Resolved, coerce, flag_name, read_resolved, write_resolved
from looptx_core.errors import DataError, LooptxError, UsageError
from looptx_core.outputs import check_output, put_in_place

SCHEMA_VERSION = 1
# What may change where a sharded run goes on; its checkpoints fit any of these.
_SPREAD = {"devices", "nodes", "micro_batch", "offload", "nvme_path"}


def resumed(
    folder: Path,
    flags: Mapping[str, Any],
    command: str,
    schema: type,
    sections: Mapping[str, type] | None = None,
) -> Resolved:
    """The settings of an interrupted run; only a limit of time may differ, and how a sharded run
    is spread."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise DataError(f"{folder}: not a run of looptx {command} (no config.yaml); check --resume")
    given = {key: value for key, value in flags.items() if value not in (None, [], ())}
    resolved = read_resolved(file, schema, sections)
    sharded = resolved.build(schema).sharding not in ("none", "ddp")
    if other := given.keys() - ({"max_minutes", *_SPREAD} if sharded else {"max_minutes"}):
        name = flag_name(sorted(other)[0]).removeprefix("flag ")
        raise UsageError(
            f"{name} can't change on --resume, which repeats the run exactly; "
            "leave it out, or start a new run"
        )
    hints = get_type_hints(schema)
    for key in _SPREAD & given.keys():
        resolved.values[key] = coerce(given[key], hints[key], flag_name(key))
        resolved.origins[key] = flag_name(key)
    resolved.values["max_minutes"] = given.get("max_minutes")
    return resolved


@dataclass
class Place:
    """Where a run is written, and where it stands once it is whole.

    They differ for a run that takes the place of another, which stays until the new one is whole.
    """

    command: str
    folder: Path | None
    """Where it is written; None: the next free number, taken when the run begins."""
    target: Path | None = None
    """Where it stands in the end; None: where it is written."""
    first: bool = True
    """Whether this process makes the folder."""
    begun: bool = False
    """Whether there is nothing to make: a resumed run, or another process's."""
    inputs: tuple[str | Path | None, ...] = ()

    @property
    def where(self) -> Path:
        """Where it is written, or the folder that will hold it: for checks of the file system."""
        return self.folder or RUNS

    def begin(self, resolved: Resolved) -> Path:
        """Make the run's folder, empty but for its settings, and return it."""
        if self.folder is None:
            self.folder = take_number(self.command)
        if self.begun or not self.first:
            return self.folder
        try:
            if self.target is not None and self.folder.exists():
                shutil.rmtree(self.folder)  # what began to take this place, and did not end
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LooptxError(
                f"cannot make {self.folder}: {error.strerror}; choose another --out"
            ) from error
        begin_run(self.folder, self.command, self.target)
        write_resolved(self.folder / "config.yaml", resolved, omit={"out", "max_minutes"})
        return self.folder

    def finish(self, result: Any) -> Any:
        """Let a whole run take its place; returns the result with the folders of then."""
        if self.target is None or not self.first:
            return result
        assert self.folder is not None
        check_output(self.target, self.command, overwrite=True, inputs=self.inputs)
        try:
            put_in_place(self.folder.resolve(), self.target.resolve())
        except OSError as error:
            raise LooptxError(
                f"cannot replace {self.target}: {error.strerror}; the new run is whole, and stands "
                f"in {self.folder}"
            ) from error
        model = self.target / result.model_folder.relative_to(self.folder)
        return replace(result, folder=self.target, model_folder=model)


def place_of(
    resume: Path | None,
    out: str | None,
    command: str,
    overwrite: bool,
    inputs: Iterable[str | Path | None] = (),
    report: Callable[[str], object] = lambda line: None,
) -> Place:
    """The run's place; what is there is checked, and nothing is made yet.

    inputs: what the run reads, which it never replaces. report: told what will be replaced.

    Raises `UsageError` for a place that is taken, and where several processes start at once and
    can't know the folder.
    """
    if RUN in os.environ:
        return Place(command, Path(os.environ[RUN]), first=is_first(), begun=True)
    inputs = tuple(inputs)
    if resume is not None:
        return Place(command, resume, replaces(resume), is_first(), True, inputs)
    several = bool(starter())
    if several and out is None:
        raise UsageError("several processes start together; name the run's folder by --out")
    if out is None:
        return Place(command, None)
    target = Path(out)
    plain = target.name not in ("", "..") and not target.is_symlink()
    beside = target if plain else target.resolve()
    beside = beside.with_name(f"{beside.name}.new")
    # Processes that start together must agree, whichever of them looks first.
    if is_first():
        next_run_dir(out, command, overwrite, inputs=inputs, report=report)
        if not os.path.lexists(target) or not any(target.iterdir()):
            beside = beside if several and overwrite else target
        elif os.path.lexists(beside):
            check_output(beside, command, overwrite=True, inputs=inputs)
    elif not overwrite:
        beside = target
    if beside == target:
        return Place(command, target, first=is_first())
    report(f"until then the new run is written to {beside}")
    return Place(command, beside, target, is_first(), inputs=inputs)


def settle(resolved: Resolved, values: Mapping[str, Any], origin: str) -> Resolved:
    """Put in what was found only now, such as the data's vocabulary."""
    for key, value in values.items():
        if resolved.values[key] != value:
            resolved.values[key], resolved.origins[key] = value, origin
    return resolved


def write_line(line: str) -> None:
    """A JSON line on stdout, at once."""
    sys.stdout.write(line)
    sys.stdout.flush()


def summary(result: Any) -> str:
    """A result's last JSON line."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(result).items()}
    values["model"] = values.pop("model_folder")
    return json.dumps({"schema_version": SCHEMA_VERSION, "summary": values}) + "\n"
