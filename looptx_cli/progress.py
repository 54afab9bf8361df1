"""Training's progress: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from looptx_cli.console import note, stderr

_LINE_EVERY = 15.0  # seconds between plain lines
_RECENT = 10.0  # seconds of training that the rate is taken over
_BAR, _RATE, _TIME = 12, 16, 7  # columns: "123,456 tokens/s", "1:23:45"
_SHOWN = {
    "train_loss": "loss {:.3f}",
    "val_loss": "held-out {:.3f}",
    "mean_loops": "loops {:.1f}",
}


def train_progress(steps: int, quiet: bool) -> L.Callback:
    """The display that fits the streams."""
    if quiet:
        return L.Callback()
    return LiveProgress(steps) if stderr().is_terminal else PlainProgress(steps)


def fitting(parts: Sequence[str], room: int) -> str:
    """As many of the parts, from the first on, as fit into so many columns; none is cut."""
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        if len(longer) > room:
            break
        line = longer
    return line


class RecentRate:
    """Tokens a second over the last seconds of training; evaluations and saves don't count."""

    def __init__(self, seconds: float = _RECENT) -> None:
        self.seconds = seconds
        self._batches: deque[tuple[float, int]] = deque()  # (seconds, tokens)
        self._last: float | None = None

    def pause(self) -> None:
        """What passes until the next batch's end is no training."""
        self._last = None

    def add(self, tokens: int, now: float) -> None:
        """A batch ended at this time."""
        if self._last is not None:
            self._batches.append((now - self._last, tokens))
            while sum(s for s, _ in self._batches) - self._batches[0][0] >= self.seconds:
                self._batches.popleft()
        self._last = now

    def __str__(self) -> str:
        seconds = sum(s for s, _ in self._batches)
        tokens = sum(n for _, n in self._batches)
        return f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 else ""


class _Display(L.Callback):
    """What both displays know: the numbers that were logged, and the recent rate."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.rate = RecentRate()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.rate.pause()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        predicted = batch["tokens"][:, 1:].numel() * trainer.world_size
        self.rate.add(predicted, time.monotonic())
        values = trainer.callback_metrics
        numbers = [form.format(float(values[n])) for n, form in _SHOWN.items() if n in values]
        self.show(trainer.global_step, numbers)

    def show(self, step: int, numbers: Sequence[str]) -> None:
        raise NotImplementedError


class LiveProgress(_Display):
    """A bar, the steps, the recent rate and the time left, then the numbers that find room."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        super().__init__(steps)
        counted = 2 * len(str(steps)) + 1
        self._taken = _BAR + counted + _RATE + _TIME + 4  # with a space after each
        self.bar = Progress(
            BarColumn(_BAR, table_column=Column(no_wrap=True, min_width=4)),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=counted)),
            TextColumn("{task.fields[rate]}", table_column=Column(no_wrap=True, min_width=_RATE)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=_TIME)),
            TextColumn("{task.fields[numbers]}", markup=False, table_column=Column(no_wrap=True)),
            console=console or stderr(),
        )

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begin(trainer.global_step)

    def begin(self, step: int) -> None:
        self.bar.start()
        self.task = self.bar.add_task("", total=self.steps, completed=step, rate="", numbers="")

    def show(self, step: int, numbers: Sequence[str]) -> None:
        room = self.bar.console.width - self._taken
        self.bar.update(
            self.task, completed=step, rate=str(self.rate), numbers=fitting(numbers, room)
        )

    def teardown(self, *_: Any, **__: Any) -> None:
        self.bar.stop()


class PlainProgress(_Display):
    """A line every few seconds, without control codes."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self.last = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begun, self.first = time.monotonic(), trainer.global_step

    def show(self, step: int, numbers: Sequence[str]) -> None:
        now = time.monotonic()
        if now - self.last < _LINE_EVERY and step < self.steps:
            return
        self.last = now
        left = (now - self.begun) / max(1, step - self.first) * (self.steps - step)
        told = "  ".join((*numbers, str(self.rate))).rstrip()
        note(f"step {step}/{self.steps}  {told}  {left / 60:.1f} min left")
