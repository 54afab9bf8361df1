"""Lightning callbacks and the logger of a run."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from looptx_core.checkpoint.metrics_log import read_metrics
from looptx_core.errors import DataError
from looptx_core.parallel.deepspeed import checkpoint as fragments
from looptx_core.parallel.ranks import any_rank


class JsonLines(Logger):
    """`metrics.jsonl`: a line a record; values by loop are lists. `watch` sees each line too."""

    def __init__(self, file: Path, watch: Callable[[str], object] | None = None) -> None:
        super().__init__()
        self.file, self.watch = file, watch

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """`config.yaml` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        # Lightning counts optimizer steps from 0 here.
        record: dict[str, Any] = {"step": (step or 0) + 1}
        for name, value in metrics.items():
            base, _, loop = name.partition("/")
            if loop:
                record.setdefault(f"{base}_by_loop", []).append(value)
            elif name not in ("epoch", "flops_epoch"):
                record[name] = value
        line = json.dumps(record) + "\n"
        with self.file.open("a") as out:
            out.write(line)
        if self.watch:
            self.watch(line)

    def cut_back(self, step: int) -> None:
        """Drop the records after `step`, and what a kill left half-written."""
        if not self.file.exists():
            return
        kept = [record for record in read_metrics(self.file) if record["step"] <= step]
        self.file.write_text("".join(json.dumps(record) + "\n" for record in kept))


class Checkpoints(ModelCheckpoint):
    """Keeps the newest checkpoints, saved when an optimizer step is over and validated."""

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        super().__init__(
            dirpath=folder,
            filename="step-{step:07d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every,
            save_on_train_epoch_end=False,
        )

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        # Lightning would save the step of a resume again, amid the next one's micro-batches.
        if not trainer.fit_loop._should_accumulate():
            super().on_train_batch_end(trainer, *args, **kwargs)


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are whole or not there, whatever ends the write.

    Lightning writes to the system's folder for temporary files and moves from there, which is a
    copy, and can be cut short, where that is another file system.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write beside the final name, then rename. Raises `OSError`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except RuntimeError as error:  # of torch's writer, on ending a file cut short
            partial.unlink(missing_ok=True)
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else error) from None
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


class Begin(L.Callback):
    """What the first process does to the run's folder, when all others have read it."""

    def __init__(self, what: Callable[[], object]) -> None:
        self.what = what

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.what()


class StopCleanly(L.Callback):
    """Ends a run between two optimizer steps: on Ctrl-C or SIGTERM, or when its time is up.

    After the run `reason` is None, 'interrupted' or 'time'; the state is saved either way.
    """

    def __init__(self, folder: Path, max_minutes: float | None) -> None:
        self.folder = folder
        self.max_seconds = max_minutes * 60 if max_minutes else float("inf")
        self.reason: str | None = None
        self.begun = time.monotonic()
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begun = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.reason = "interrupted"
        signal.signal(number, self._handlers[number])  # a second one stops at once

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.reason is None and time.monotonic() - self.begun > self.max_seconds:
            self.reason = "time"
        if trainer.fit_loop._should_accumulate():
            return
        device = trainer.strategy.root_device
        for reason in ("interrupted", "time"):  # of any process, so that all stop here
            if any_rank(self.reason == reason, device):
                self.reason = reason
        if self.reason:
            path = self.folder / f"step-{trainer.global_step:07d}.ckpt"
            if not path.exists():
                trainer.save_checkpoint(path)
            trainer.should_stop = True

    def teardown(self, *_: Any, **__: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def resume_point(folder: Path, metrics: Path, log_every: int, val_every: int) -> Path | None:
    """The last checkpoint to go on from without a gap in the log.

    Lightning saves a step before it logs and validates it; a kill in between leaves a checkpoint
    ahead of its records, and the one before it serves.
    """
    found = sorted(folder.glob("step-*.ckpt"), reverse=True)
    if not metrics.exists():
        return found[0] if found else None
    trained: set[int] = set()
    validated: set[int] = set()
    for record in read_metrics(metrics):
        (validated if "val_loss" in record else trained).add(record["step"])
    for file in found:
        step = step_of(file)
        logged = step % log_every or step in trained
        if logged and (step % val_every or step in validated):
            return file
    return None


def processes_of(checkpoint: Path) -> int | None:
    """How many saved it; None where an older looptx did not say. Raises `DataError` for one that
    can't be read."""
    if checkpoint.is_dir():
        return fragments.Checkpoint(checkpoint).world_size
    try:
        saved = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        return saved["looptx"].get("processes")
    except Exception as error:  # a file cut short has many ways to fail
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{checkpoint}: not a whole checkpoint ({reason}); remove it to go on from the one "
            "before"
        ) from error


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved at."""
    try:
        return int(checkpoint.stem.removeprefix("step-"))
    except ValueError as error:
        raise DataError(f"{checkpoint}: not a checkpoint of looptx; remove it") from error
