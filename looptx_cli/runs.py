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

from looptx_core.atomic import finish_replacement, put_in_place
from looptx_core.checkpoint.registry import RUNS, next_run_dir, take_number
from looptx_core.checkpoint.run_facts import (
    begin_run,
    check_origin,
    read_facts,
    replaces,
    update_facts,
)
from looptx_core.checkpoint.run_lock import FILE as LOCK
from looptx_core.checkpoint.run_lock import RunLock, refuse_if_running
from looptx_core.config.processes import RUN, is_first, starter
from looptx_core.config.resolve import Resolved, flag_name, read_resolved, write_resolved
from looptx_core.errors import DataError, LooptxError, UsageError
from looptx_core.outputs import check_output, holds_anything
from looptx_core.schema import coerce
from looptx_core.words import counted, quoted

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
    if is_first():
        finish_replacement(folder)
    file = folder / "config.yaml"
    if not file.is_file():
        raise DataError(f"{folder}: not a run of looptx {command} (no config.yaml); check --resume")
    if (made_by := read_facts(folder).get("command") or command) != command:
        raise UsageError(
            f"{folder}: a run of looptx {made_by}; go on with it by looptx {made_by} "
            f"--resume {quoted(folder)}"
        )
    given = {key: value for key, value in flags.items() if value not in (None, [], ())}
    resolved = read_resolved(file, schema, sections)
    sharded = resolved.build(schema).sharding not in ("none", "ddp")
    may_change = {"max_minutes", "steps", *(_SPREAD if sharded else ())}
    if other := given.keys() - may_change:
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
class RunFolder:
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
    resumed: bool = False
    until: int | None = None
    """The last step of a resumed run, which its folder remembers."""
    inputs: tuple[str | Path | None, ...] = ()
    _lock: RunLock | None = None

    @property
    def where(self) -> Path:
        """Where it is written, or the folder that will hold it: for checks of the file system."""
        return self.folder or RUNS

    def begin(
        self,
        resolved: Resolved,
        origin: Mapping[str, str],
        report: Callable[[str], object] = lambda line: None,
    ) -> Path:
        """Take the run's folder for this process alone, and make it, empty but for its settings.

        origin: fingerprints of what the run is made from. Returns the folder.

        Raises `UsageError` where another process writes there, `DataError` for a run to go on with
        that was made from something else.
        """
        if not self.first:
            assert self.folder is not None
            return self.folder
        if self.folder is None:
            self.folder = take_number(self.command)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.folder)
            self._lock.acquire(report)
            if self.resumed:
                check_origin(self.folder, origin)
                if self.until:
                    update_facts(self.folder, until=self.until)
                return self.folder
            if self.target is not None:
                _check_waiting(self.folder, self.target)
                _empty(self.folder)  # of what began to take this place, and did not end
            elif (self.folder / "config.yaml").exists():
                raise UsageError(f"{self.folder} exists; choose another --out")
        except OSError as error:
            raise LooptxError(
                f"cannot make {self.folder}: {error.strerror}; choose another --out"
            ) from error
        begin_run(self.folder, self.command, self.target, origin)
        write_resolved(self.folder / "config.yaml", resolved, omit={"out", "max_minutes"})
        return self.folder

    def finish(self, result: Any) -> Any:
        """Note that a run is whole and let it take its place; returns the result with the folders
        where it stands then."""
        assert self.folder is not None
        update_facts(self.folder, finished=result.steps)
        if self.target is None:
            return result
        check_output(self.target, self.command, overwrite=True, inputs=self.inputs)
        refuse_if_running(self.target)
        try:
            put_in_place(self.folder.resolve(), self.target.resolve())
        except OSError as error:
            raise LooptxError(
                f"cannot replace {self.target}: {error.strerror}; the new run is whole, and stands "
                f"in {self.folder}"
            ) from error
        if self._lock is not None:
            self._lock.file = self.target / self._lock.file.name
        model = self.target / result.model_folder.relative_to(self.folder)
        return replace(result, folder=self.target, model_folder=model)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()


def _check_waiting(folder: Path, target: Path) -> None:
    """Raise `UsageError` for a folder that holds something else than what began to take a target's
    place and did not end."""
    if not folder.is_dir() or not holds_anything(folder):
        return
    place = replaces(folder)
    if place is None or place.resolve() != target.resolve():
        raise UsageError(
            f"{folder} is there already, and the new run would be written to it before it takes "
            f"the place of {target}; move it away, or choose another --out"
        )


def _empty(folder: Path) -> None:
    """Remove all but the lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def settle_length(resolved: Resolved) -> None:
    """Let the epochs or the steps of a new run say its length, as flags win over the environment
    and this over a file. Raises `UsageError` where both are given in one of these."""
    if resolved.values["epochs"] is None or not resolved.given("steps"):
        return
    epochs, steps = (_layer(resolved.origins[key]) for key in ("epochs", "steps"))
    if epochs == steps:
        raise UsageError("--epochs and --steps each say how long the run is; leave one out")
    if steps < epochs:
        resolved.values["epochs"] = None


def _layer(origin: str) -> int:
    """0 for a flag, 1 for the environment, 2 for a file."""
    return 0 if origin.startswith("flag ") else 1 if origin.startswith("LOOPTX_") else 2


def last_step(folder: Path, steps: int, asked: int | None, report: Callable[[str], object]) -> int:
    """The step to which a resumed run goes on; 0 where it has finished and nothing is to do.

    steps: of its settings. asked: a number of steps that was given anew, to go on with a run that
    has finished. report: told where nothing is to do.

    Raises `UsageError` for another number before that.
    """
    facts = read_facts(folder)
    until, done = int(facts.get("until") or steps), int(facts.get("finished") or 0)
    waits = replaces(folder) is not None  # whole, perhaps, and yet to take its place
    if asked in (None, until) and (done < until or waits):
        return until
    if asked is not None and done < until:
        raise UsageError(
            f"--steps can't change before the run has done its {counted(until, 'step')}; leave "
            "it out, or start a new run"
        )
    if asked is not None and asked > done:
        return asked
    if asked is not None and asked < done:
        raise UsageError(f"--steps {asked}: this run has done {done:,} steps; give more")
    report(f"{folder}: finished, {counted(done, 'step')}; --steps N with more of them goes on")
    return 0


def run_folder(
    resume: Path | None,
    out: str | None,
    command: str,
    overwrite: bool,
    inputs: Iterable[str | Path | None] = (),
    report: Callable[[str], object] = lambda line: None,
) -> RunFolder:
    """The run's place; what is there is checked, and nothing is made yet.

    inputs: what the run reads, which it never replaces. report: told what will be replaced.

    Raises `UsageError` for a place that is taken, and where several processes start at once and
    can't know the folder.
    """
    if RUN in os.environ:
        return RunFolder(command, Path(os.environ[RUN]), None, is_first(), resumed=True)
    inputs = tuple(inputs)
    if resume is not None:
        if is_first() and (taken := replaces(resume)):
            finish_replacement(taken)
        return RunFolder(command, resume, replaces(resume), is_first(), True, inputs=inputs)
    several = bool(starter())
    if several and out is None:
        raise UsageError("several processes start together; name the run's folder by --out")
    if out is None:
        return RunFolder(command, None)
    target = Path(out)
    plain = target.name not in ("", "..") and not target.is_symlink()
    beside = target if plain else target.resolve()
    beside = beside.with_name(f"{beside.name}.new")
    # Processes that start together must agree, whichever of them looks first.
    if is_first():
        finish_replacement(target)
        next_run_dir(out, command, overwrite, inputs=inputs, report=report)
        if not os.path.lexists(target) or not any(target.iterdir()):
            beside = beside if several and overwrite else target
        else:
            refuse_if_running(target)
        if beside != target and os.path.lexists(beside):
            _check_waiting(beside, target)
            check_output(beside, command, overwrite=True, inputs=inputs)
    elif not overwrite:
        beside = target
    if beside == target:
        return RunFolder(command, target, first=is_first())
    report(f"until then the new run is written to {beside}")
    return RunFolder(command, beside, target, is_first(), inputs=inputs)


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
