"""Training's progress: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from looptx_cli.console import note, stderr

_LINE_EVERY = 15.0  # seconds between plain lines
_SHOWN = {
    "train_loss": "loss {:.3f}",
    "val_loss": "held-out {:.3f}",
    "mean_loops": "loops {:.1f}",
    "confidence_error": "confidence error {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
}


def train_progress(steps: int, quiet: bool) -> L.Callback:
    """The display that fits the streams."""
    if quiet:
        return L.Callback()
    return LiveProgress(steps) if stderr().is_terminal else PlainProgress(steps)


def _numbers(trainer: L.Trainer) -> str:
    values = trainer.callback_metrics
    return "  ".join(form.format(float(values[n])) for n, form in _SHOWN.items() if n in values)


class LiveProgress(L.Callback):
    """A bar with loss, tokens/s, mean loops, confidence error and the time left."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        # Where the terminal is narrow the numbers give way, and not the time left.
        self.bar = Progress(
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, table_column=Column(min_width=5, no_wrap=True)),
            TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
            console=stderr(),
        )

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.bar.start()
        self.task = self.bar.add_task(
            "", total=self.steps, completed=trainer.global_step, numbers=""
        )

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.bar.update(self.task, completed=trainer.global_step, numbers=_numbers(trainer))

    def teardown(self, *_: Any, **__: Any) -> None:
        self.bar.stop()


class PlainProgress(L.Callback):
    """A line every few seconds, without control codes."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.last = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begun, self.first = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        now, step = time.monotonic(), trainer.global_step
        if now - self.last < _LINE_EVERY and step < self.steps:
            return
        self.last = now
        left = (now - self.begun) / max(1, step - self.first) * (self.steps - step)
        note(f"step {step}/{self.steps}  {_numbers(trainer)}  {left / 60:.1f} min left")
