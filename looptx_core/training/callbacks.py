"""Lightning callbacks and the logger of a run."""

from __future__ import annotations

import json
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from looptx_core.atomic import replacing, write_file
from looptx_core.checkpoint.metrics_log import read_metrics
from looptx_core.errors import DataError
from looptx_core.machine.integrity import check_noted, digest_file, note_digest, sha256_of
from looptx_core.parallel.deepspeed import checkpoint as fragments
from looptx_core.parallel.ranks import any_rank

GO_BACK = "remove it to go on from the one before"


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
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
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
        write_file(self.file, "".join(json.dumps(record) + "\n" for record in kept))

    def mark_stretch(self, begin: int, end: int, lr: float) -> None:
        """Note where a finished run goes on, once."""
        mark = {"step": begin, "stretch": {"from": begin, "to": end, "lr": lr}}
        if mark not in read_metrics(self.file):
            self._write(mark)


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
        if trainer.fit_loop._should_accumulate():
            return
        every = self._every_n_train_steps
        if trainer.global_step >= trainer.max_steps:
            self._every_n_train_steps = 1  # the last step too, for a run that is to go on
        super().on_train_batch_end(trainer, *args, **kwargs)
        self._every_n_train_steps = every


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
        try:
            with replacing(path) as temporary:
                with temporary.open("wb") as file:
                    torch.save(checkpoint, file)
                digest = sha256_of(temporary)
                # An older file's digest must not stand beside this one, not even after a kill.
                digest_file(path).unlink(missing_ok=True)
            note_digest(path, digest)
        except RuntimeError as error:  # of torch's writer, on ending a file cut short
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else error) from None

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint with its digest."""
        super().remove_checkpoint(path)
        digest_file(Path(path)).unlink(missing_ok=True)


class Begin(L.Callback):
    """What the first process does to the run's folder, when all others have read it."""

    def __init__(self, what: Callable[[], object]) -> None:
        self.what = what

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.what()


class StopCleanly(L.Callback):
    """Ends a run between two optimizer steps: on Ctrl-C, SIGTERM or SIGHUP, when its time is up,
    or when a process that reads data was killed.

    After the run `reason` is None, 'interrupted', 'time' or 'worker'; the state is always saved.
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
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                # What nohup ignores stays ignored.
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._on_signal)

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        """When a worker was killed, save if that was noticed between two steps, where the state
        is whole; torch may tell in the midst of one, and then the last checkpoint counts."""
        if not lost_worker(exception):
            return
        self.reason = "worker"
        frames = traceback.extract_tb(exception.__traceback__)
        waiting = any("dataloader" in frame.filename for frame in frames)
        if waiting and trainer.global_step and not trainer.fit_loop._should_accumulate():
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        path = self.folder / f"step-{trainer.global_step:07d}.ckpt"
        if not path.exists():
            trainer.save_checkpoint(path)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.reason = "interrupted"
        signal.signal(number, self._handlers[number])  # a second one stops at once

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.reason is None and time.monotonic() - self.begun > self.max_seconds:
            self.reason = "time"
        if trainer.fit_loop._should_accumulate():
            return
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True  # so that Lightning validates the last step
        device = trainer.strategy.root_device
        for reason in ("interrupted", "time"):  # of any process, so that all stop here
            if any_rank(self.reason == reason, device):
                self.reason = reason
        if self.reason:
            self._save(trainer)
            trainer.should_stop = True

    def teardown(self, *_: Any, **__: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def lost_worker(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that one of the loader's processes ended.

    Torch says so when the signal arrives, in the midst of whatever runs, which may wrap the error;
    a connection that breaks may be noticed before.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, RuntimeError) and "DataLoader worker" in str(found):
            return True
        frames = traceback.extract_tb(found.__traceback__)
        broken = isinstance(found, OSError | EOFError)
        if broken and any("multiprocessing" in frame.filename for frame in frames):
            return True
        found = found.__cause__ or found.__context__
    return False


def resume_point(
    folder: Path, metrics: Path, *, log_every: int, val_every: int, save_every: int, last_step: int
) -> tuple[Path | None, bool]:
    """The checkpoint to go on from, and whether the log has all records up to it.

    Lightning saves a step before it logs and validates it; a kill in between leaves a checkpoint
    ahead of its records, and the one before it serves, or the start before the first one. Where
    the log lost more than that, the newest checkpoint serves all the same.
    """
    found = sorted(folder.glob("step-*.ckpt"), reverse=True)
    trained: set[int] = set()
    validated: set[int] = set()
    for record in read_metrics(metrics):
        (validated if "val_loss" in record else trained).add(record["step"])
    for file in found:
        step = step_of(file)
        logged = step % log_every or step in trained
        judged = (step % val_every and step != last_step) or step in validated
        if logged and judged:
            return file, True
    if not found:
        return None, True
    before = range(log_every, step_of(found[-1]), log_every)
    if step_of(found[-1]) <= save_every and trained.issuperset(before) and metrics.exists():
        return None, True
    return found[0], False


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
        raise DataError(f"{checkpoint}: not a whole checkpoint ({reason}); {GO_BACK}") from error


def verify_checkpoint(checkpoint: Path) -> bool:
    """Whether a checkpoint has digests, as those of older versions have not.

    Raises `DataError` where it does not agree with them, or is not whole.
    """
    sharded = checkpoint.is_dir()
    files = fragments.Checkpoint(checkpoint).files if sharded else [checkpoint]
    noted = [check_noted(file, GO_BACK) for file in files]
    processes_of(checkpoint)
    return all(noted)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved at."""
    try:
        return int(checkpoint.stem.removeprefix("step-"))
    except ValueError as error:
        raise DataError(f"{checkpoint}: not a checkpoint of looptx; remove it") from error
