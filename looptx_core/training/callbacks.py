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
from looptx_core.documents import check_regular
from looptx_core.errors import DataError
from looptx_core.machine.integrity import check_noted, digest_file, note_digest, sha256_of
from looptx_core.parallel.deepspeed import checkpoint as fragments
from looptx_core.parallel.ranks import any_rank, mean_over_ranks

UNUSED = ("epoch", "flops_epoch")
"""Figures that Lightning adds and no log of ours takes."""
GO_BACK = "remove it to go on from the one before"


class JsonLines(Logger):
    """Writes `metrics.jsonl`: a line for each record, in which values by loop are lists.

    watch: called with each line.
    """

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
        """Nothing to do: `config.yaml` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        # Lightning counts optimizer steps from 0 here.
        record: dict[str, Any] = {"step": (step or 0) + 1}
        for name, value in metrics.items():
            base, _, loop = name.partition("/")
            if loop:
                record.setdefault(f"{base}_by_loop", []).append(value)
            elif name not in UNUSED:
                record[name] = value
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record) + "\n"
        with self.file.open("a") as out:
            out.write(line)
        if self.watch:
            self.watch(line)

    def begin(self, after: int | None) -> None:
        """Make the file, so that a log which is missing later was lost and not merely unwritten.

        after: of a resumed run, the step from which on the records come anew.
        """
        self.file.touch()
        if after is not None:
            self.cut_back(after)

    def cut_back(self, step: int) -> None:
        """Drop the records after `step`, and a last line that was only partly written."""
        if not self.file.exists():
            return
        kept = [record for record in read_metrics(self.file) if record["step"] <= step]
        write_file(self.file, "".join(json.dumps(record) + "\n" for record in kept))

    def mark_stretch(self, begin: int, end: int, lr: float) -> None:
        """Record, once, that a finished run continues at this learning rate."""
        mark = {"step": begin, "stretch": {"from": begin, "to": end, "lr": lr}}
        if mark not in read_metrics(self.file):
            self._write(mark)


class Checkpoints(ModelCheckpoint):
    """Keeps the newest checkpoints, saved after an optimizer step and its validation."""

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
        # Between micro-batches, Lightning would save the step of a resume again.
        if trainer.fit_loop._should_accumulate():
            return
        every = self._every_n_train_steps
        if trainer.global_step >= trainer.max_steps:
            self._every_n_train_steps = 1  # save the last step too, so that a run can continue
        super().on_train_batch_end(trainer, *args, **kwargs)
        self._every_n_train_steps = every


class BestWeights(L.Callback):
    """Keeps the weights with the lowest held-out loss at the last loop, in a folder of their own.

    What was best before a resume is read from the run's log: a callback's state is saved before the
    validation of its step, so it would not know. The weights are saved before their loss is logged,
    so that a loss in the log always has its weights, or later and better ones.
    """

    def __init__(self, folder: Path, metrics: Path) -> None:
        self.folder, self.metrics = folder, metrics
        self.lowest = float("inf")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        records = read_metrics(self.metrics)
        losses = [record["val_loss"] for record in records if "val_loss" in record]
        self.lowest = min(losses, default=float("inf"))

    def on_validation_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        own = torch.tensor(module.validated.loss_by_loop[-1], device=module.device)
        loss = float(mean_over_ranks(own))
        if loss >= self.lowest:
            return
        self.lowest = loss
        best = self.folder / f"step-{trainer.global_step:07d}.ckpt"
        trainer.save_checkpoint(best, weights_only=True)
        for other in self.folder.glob("step-*.ckpt"):
            if other != best:
                trainer.strategy.remove_checkpoint(other)

    def load(self, module: L.LightningModule) -> int | None:
        """Give the module's model the best weights; returns their step, None if there are none."""
        files = sorted(self.folder.glob("step-*.ckpt"))
        if not files:
            return None
        verify_checkpoint(files[-1])
        state = torch.load(files[-1], map_location="cpu", mmap=True, weights_only=True)
        weights = {name: value for name, value in state["state_dict"].items()
                   if name.startswith("model.")}  # fmt: skip
        module.load_state_dict(weights, strict=False)
        return step_of(files[-1])


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints atomically: a file is complete or does not exist.

    Lightning writes to the system's temporary folder and moves the file. Across file systems that
    is a copy, which can be interrupted.
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
        except RuntimeError as error:  # torch's writer hides the OSError of a failed write
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else error) from None

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint with its digest."""
        super().remove_checkpoint(path)
        digest_file(Path(path)).unlink(missing_ok=True)


class AtSetup(L.Callback):
    """Calls `action` in the first process, once all others have read the run's folder."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.action()


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

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        # From here on: Lightning ends a signal before the first step with exit code 1, in silence.
        self._take_signals()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begun = time.monotonic()
        self._take_signals()  # again, as Lightning has taken SIGTERM since

    def _take_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # What nohup ignores stays ignored.
            if number is None or signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._handlers.setdefault(number, signal.getsignal(number))
            signal.signal(number, self._on_signal)

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        """When a worker was killed, save if this was noticed between two steps.

        Only then is the state consistent. Torch may notice within a step; then the last checkpoint
        has to serve.
        """
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
        for reason in ("interrupted", "time"):  # of any process, so that all stop at one step
            if any_rank(self.reason == reason, device):
                self.reason = reason
        if self.reason:
            self._save(trainer)
            trainer.should_stop = True

    def restore_signals(self) -> None:
        """To be called after the run: Lightning ends by putting back what it found, our handler."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def lost_worker(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that a process of the data loader ended.

    Torch raises it when the signal arrives, within any code, which may wrap the error. A broken
    connection to the process may be noticed first.
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
    """The checkpoint to resume from, and whether the log has all records up to it.

    Lightning saves a step before it logs and validates it. If the run was killed in between, the
    newest checkpoint has no records, and the one before it is taken, or the start of the run (None)
    if there is none. If the log lacks more than that, the newest checkpoint is taken all the same.
    Raises `DataError` for a run in which something is no file, at which a logger would wait.
    """
    check_regular(metrics.parent)
    found = sorted(folder.glob("step-*.ckpt"), reverse=True)
    trained: set[int] = set()
    validated: set[int] = set()
    for record in read_metrics(metrics):
        if "val_loss" in record:
            validated.add(record["step"])
        elif "train_loss" in record:
            trained.add(record["step"])
    for file in found:
        step = step_of(file)
        logged = step % log_every or step in trained
        checked = (step % val_every and step != last_step) or step in validated
        if logged and checked:
            return file, True
    if not found:
        return None, True
    before = range(log_every, step_of(found[-1]), log_every)
    if step_of(found[-1]) <= save_every and trained.issuperset(before) and metrics.exists():
        return None, True
    return found[0], False


def processes_of(checkpoint: Path) -> int | None:
    """How many processes saved a checkpoint; None if it does not say.

    Raises `DataError` for one that can't be read.
    """
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
    """The step at which a checkpoint was saved. Raises `DataError` for another file's name."""
    try:
        return int(checkpoint.stem.removeprefix("step-"))
    except ValueError as error:
        raise DataError(f"{checkpoint}: not a checkpoint of looptx; remove it") from error
