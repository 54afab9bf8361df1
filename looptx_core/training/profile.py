"""A profile of some steps of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch

from looptx_core.atomic import write_file

WARM_STEPS = 2
"""They allocate memory and compile, and are left out."""


class Profile(L.Callback):
    """Profiles `steps` optimizer steps of the first process by torch's profiler, once the first
    two are over.

    `folder` gets trace.json, for Perfetto or chrome://tracing, and table.txt with the operations
    that take longest. A run that ends before writes what there is.
    """

    def __init__(self, folder: Path, steps: int, begun_at: int) -> None:
        self.folder = folder
        self.first = begun_at + WARM_STEPS
        self.last = self.first + steps
        self._profiler: torch.profiler.profile | None = None

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        here = trainer.is_global_zero and self.first <= trainer.global_step < self.last
        if here and self._profiler is None:
            # Its C++ part notes each start and stop on standard error, above the level of errors.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            self._profiler = torch.profiler.profile()
            self._profiler.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.last:
            self._write()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._write()

    def _write(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self.folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        averages = profiler.key_averages()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        table = averages.table(sort_by=f"self_{device}_time_total", row_limit=40)
        write_file(self.folder / "table.txt", table + "\n")
