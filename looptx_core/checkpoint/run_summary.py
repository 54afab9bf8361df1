"""What the runs of a folder are and how far they came, from their small files alone."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from looptx_core.checkpoint.metrics_log import FILE as METRICS
from looptx_core.checkpoint.metrics_log import read_metrics
from looptx_core.checkpoint.registry import RUNS
from looptx_core.checkpoint.run_facts import FILE as RUN_FACTS
from looptx_core.checkpoint.run_facts import read_facts, run_command
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.model import ModelConfig
from looptx_core.config.resolve import Resolved, read_resolved
from looptx_core.config.run import TrainConfig
from looptx_core.config.sweep import FILE as SWEEP
from looptx_core.documents import read_json
from looptx_core.errors import DataError, LooptxError

State = Literal["finished", "unfinished", "damaged"]


@dataclass(frozen=True)
class RunSummary:
    """One run. Losses are of held-out data, in nats a token."""

    name: str
    folder: Path
    state: State
    problem: str = ""
    """What is wrong with a damaged run."""
    command: str | None = None
    data: tuple[str, ...] = ()
    """What it trains on; none is the bundled data."""
    steps: int = 0
    """Optimizer steps that were done."""
    planned_steps: int | None = None
    best_loss: float | None = None
    best_bits_per_byte: float | None = None
    bytes: int = 0
    """Size of the folder."""
    updated: str | None = None
    """When it was written last, in UTC by ISO 8601."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"folder": str(self.folder), "data": list(self.data)}


@dataclass(frozen=True)
class RunDetails:
    """A run that can be read: its summary, settings, records, and what its model's folder tells."""

    summary: RunSummary
    settings: Resolved
    records: list[dict[str, Any]] = field(default_factory=list)
    """The lines of `metrics.jsonl`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of the training, as the finished model's folder holds them."""


def list_runs(runs: Path = RUNS) -> list[RunSummary]:
    """The runs of `train` and `finetune` in a folder, the newest first.

    Those of a sweep are among them, named by the sweep's folder and their own. A run that can't be
    read is listed as damaged. A folder with neither `config.yaml` nor `run.json` is no run.

    Raises `DataError` where `runs` is there and can't be listed.
    """
    if not runs.exists():
        return []
    found = []
    for folder in _folders(runs):
        if _is_run(folder):
            found.append(_summary_of(folder))
        elif (folder / SWEEP).is_file():
            swept = [_summary_of(run) for run in _folders(folder) if _is_run(run)]
            found += [replace(run, name=f"{folder.name}/{run.name}") for run in swept]
    return sorted(found, key=lambda run: (run.updated or "", run.name), reverse=True)


def read_run(folder: Path) -> RunDetails:
    """A run by its folder. Raises `DataError` or `UsageError` for one that can't be read."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise DataError(f"{folder}: no config.yaml, so not a run of looptx; check the path")
    facts = read_facts(folder)
    command = run_command(folder)
    if command == "finetune":
        settings = read_resolved(file, FinetuneConfig)
    else:
        settings = read_resolved(file, TrainConfig, {"model": ModelConfig})
    records, model_facts = read_metrics(folder / METRICS), _model_facts(folder / "final")
    done = max((record["step"] for record in records), default=0)
    planned = facts.get("until")
    planned = planned if isinstance(planned, int) else settings.values["steps"]
    finished = model_facts is not None and facts.get("finished", planned) == planned
    held_out = [*_numbers(record.get("val_loss") for record in records),
                *_numbers(_listed(model_facts, "loss_by_loop"))]  # fmt: skip
    bits = [*_numbers(_listed(model_facts, "bits_per_byte_by_loop"))]
    summary = RunSummary(
        name=folder.resolve().name,
        folder=folder,
        state="finished" if finished else "unfinished",
        command=command,
        data=tuple(map(str, settings.values["data"])),
        steps=done,
        planned_steps=planned,
        best_loss=min(held_out, default=None),
        best_bits_per_byte=min(bits, default=None),
        **_on_disk(folder),
    )
    return RunDetails(summary, settings, records, model_facts or {})


def _folders(place: Path) -> list[Path]:
    try:
        return [path for path in place.iterdir() if path.is_dir() and path.name[0] != "."]
    except OSError as error:
        raise DataError(
            f"{place}: cannot be listed ({error.strerror}); give another one"
        ) from error


def _summary_of(folder: Path) -> RunSummary:
    try:
        return read_run(folder).summary
    except (LooptxError, OSError) as error:
        problem = " ".join(str(error).split())
        return RunSummary(folder.name, folder, "damaged", problem, **_on_disk(folder))


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / RUN_FACTS).is_file()


def _model_facts(final: Path) -> dict[str, Any] | None:
    """What a finished model's or adapter's folder tells of its training; None without a model."""
    for marker, name in (("adapter_config.json", "looptx.json"), ("config.json", "config.json")):
        if (final / marker).is_file():
            facts = read_json(final / name).get("facts")
            return facts if isinstance(facts, dict) else {}
    return None


def _listed(facts: Mapping[str, Any] | None, key: str) -> list[Any]:
    values = (facts or {}).get(key)
    return values if isinstance(values, list) else []


def _numbers(values: Iterable[Any]) -> Iterable[float]:
    """Those that are finite numbers."""
    for value in values:
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:  # of ints, too
            yield float(value)


def _on_disk(folder: Path) -> dict[str, Any]:
    """`bytes` and `updated` of a folder; files that vanish meanwhile don't count."""
    size, newest = 0, 0.0
    for path in folder.rglob("*"):
        try:
            found = path.lstat()
        except OSError:
            continue
        if not path.is_dir():
            size, newest = size + found.st_size, max(newest, found.st_mtime)
    newest = newest or folder.stat().st_mtime
    when = datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds")
    return {"bytes": size, "updated": when}
