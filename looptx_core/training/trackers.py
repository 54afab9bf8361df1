"""Experiment trackers: what a run logs goes to Weights & Biases, MLflow or Trackio too.

Each is an extra of its name. The trackers' own variables say where the figures go, such as
WANDB_MODE, MLFLOW_TRACKING_URI and TRACKIO_DIR; without them MLflow writes to the run's folder.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from looptx_core.atomic import write_file
from looptx_core.documents import read_json, to_json
from looptx_core.errors import DataError, LooptxError, MissingError
from looptx_core.training.callbacks import UNUSED

FILE = "trackers.json"
"""In a run's folder: the tracker's id of the run, which a resumed run goes on with, by tracker."""
PROJECT = "looptx"
_own_databases: set[str] = set()  # MLflow writes the one it uses into MLFLOW_TRACKING_URI


class Opened(NamedTuple):
    """A run at a tracker."""

    id: str
    log: Callable[[dict[str, float], int], object]
    """Takes figures and the number of optimizer steps done."""
    close: Callable[[bool], object]
    """Ends the run; takes whether it succeeded."""


Open = Callable[[Path, "str | None", Mapping[str, Any]], Opened]
"""Begins a run at a tracker: its folder, the id to go on with, its settings."""


def open_wandb(folder: Path, id: str | None, settings: Mapping[str, Any]) -> Opened:
    """By Lightning's logger, in the run's folder; without console capture."""
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(
        name=_name(folder), save_dir=folder, id=id or uuid.uuid4().hex[:8],
        project=os.environ.get("WANDB_PROJECT", PROJECT), config=dict(settings),
        settings=wandb.Settings(silent=True, console="off"),
    )  # fmt: skip
    run = logger.experiment
    return Opened(run.id, logger.log_metrics, lambda well: run.finish(exit_code=0 if well else 1))


def open_mlflow(folder: Path, id: str | None, settings: Mapping[str, Any]) -> Opened:
    """By Lightning's logger; a database in the run's folder unless a server is named."""
    import logging

    from lightning.pytorch.loggers import MLFlowLogger

    import_module("mlflow")  # which sets the level of its notes on import
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning warns of each new experiment.
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)
    own = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    where = os.environ.get("MLFLOW_TRACKING_URI")
    if not where or where in _own_databases:
        where = own
        _own_databases.add(own)
    project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    logger = MLFlowLogger(project, _name(folder), where, run_id=id)
    found = logger.run_id
    assert found is not None
    if id is None:
        logger.log_hyperparams(dict(settings))
    return Opened(
        found, logger.log_metrics,
        lambda well: logger.finalize("success" if well else "failed"),
    )  # fmt: skip


def open_trackio(folder: Path, id: str | None, settings: Mapping[str, Any]) -> Opened:
    """By its own library, as Lightning has no logger for it; a run is known by its name."""
    import trackio

    name = id or f"{_name(folder)}-{uuid.uuid4().hex[:8]}"

    def quietly(action: Callable[[], Any]) -> Any:
        with redirect_stdout(io.StringIO()):  # standard output belongs to the command's result
            return action()

    run = quietly(
        lambda: trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=name, config=dict(settings),
            resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )
    )  # fmt: skip
    # By the module, which at the end of the process would finish, and print, a run of its own.
    return Opened(
        name, lambda figures, step: run.log(figures, step=step), lambda _: quietly(trackio.finish)
    )


TRACKERS: dict[str, tuple[Open, str]] = {
    "wandb": (open_wandb, "run wandb login, or set WANDB_MODE=offline"),
    "mlflow": (open_mlflow, "check MLFLOW_TRACKING_URI"),
    "trackio": (open_trackio, "check TRACKIO_DIR, TRACKIO_SERVER_URL or TRACKIO_SPACE_ID"),
}
"""By name: how to begin a run, and what may mend it when that fails."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise `MissingError` for a tracker whose package is not installed."""
    for name in asked(names):
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of this name is no package
            raise MissingError(f"`log` {name} needs the package; pip install 'looptx[{name}]'")


def asked(names: Sequence[str]) -> list[str]:
    """The trackers among the values of `log`, each once. TensorBoard's files are always written."""
    return [name for name in dict.fromkeys(names) if name in TRACKERS]


class Tracker(Logger):
    """Sends what Lightning logs to a tracker, with the steps of `metrics.jsonl`.

    A tracker that fails once the run has begun is left out from then on, with one line.
    """

    def __init__(self, name: str, folder: Path, report: Callable[[str], object]) -> None:
        super().__init__()
        self._name, self.folder, self.report = name, folder, report
        self._opened: Opened | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return self._opened.id if self._opened else ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to do: `begin` has passed the settings on."""

    def begin(self, settings: Mapping[str, Any], resume: bool) -> None:
        """Begin the run at the tracker, or go on with it; in the run's first process alone.

        Raises `LooptxError` where the tracker refuses.
        """
        open_run, mend = TRACKERS[self._name]
        ids = _read_ids(self.folder) if resume else {}
        try:
            self._opened = open_run(self.folder, ids.get(self._name), settings)
        except Exception as error:  # of the tracker, a network, a server: many kinds
            raise LooptxError(
                f"`log` {self._name} can't begin ({_reason(error)}); {mend}, or leave it out"
            ) from error
        self.report(f"{self._name}: run {self._opened.id}")
        write_file(self.folder / FILE, to_json(ids | {self._name: self._opened.id}))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        figures = {name: value for name, value in metrics.items() if name not in UNUSED}
        # Lightning counts optimizer steps from 0 here.
        self._attempt(lambda opened: opened.log(figures, (step or 0) + 1))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._attempt(lambda opened: opened.close(status == "success"))
        self._opened = None

    def _attempt(self, action: Callable[[Opened], object]) -> None:
        if self._opened is None:
            return
        try:
            action(self._opened)
        except Exception as error:
            self._opened = None
            self.report(f"{self._name}: left out from here on ({_reason(error)})")


def _read_ids(folder: Path) -> dict[str, str]:
    """The ids of an earlier part of the run. Raises `DataError` for a damaged file."""
    file = folder / FILE
    mend = "remove it to begin new runs at the trackers"
    if not file.is_file():
        return {}
    found = read_json(file, mend=mend)
    if not all(isinstance(value, str) and value for value in found.values()):
        raise DataError(f"{file}: an id is not a text; {mend}")
    return dict(found)


def _name(folder: Path) -> str:
    """A run's name, also where it is written beside the run whose place it takes."""
    return folder.resolve().name.removesuffix(".new")


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
