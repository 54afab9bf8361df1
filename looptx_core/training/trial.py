"""A few steps of a run, done to see how long they take."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import RunConfig
from looptx_core.data.datamodule import Batches
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.run import fit

_TIMED = 2  # after one that warms up


def time_new_model(model: ModelConfig, config: RunConfig) -> float:
    """The seconds of a step of a new model, on random tokens."""
    torch.manual_seed(config.seed)
    text = _RandomTokens(config.batch_size, config.seq_len, model.vocab_size)
    batches = Batches(text, text, micro_batch=config.micro_batch_size, batches=1, seed=config.seed)
    return time_steps(LoopedTransformer(model), batches, config)


def time_steps(model: LoopedTransformer, batches: Batches, config: RunConfig) -> float:
    """The mean seconds of two steps after one that warms up. They train the model."""
    # More steps than are done, as the last one would be saved and evaluated.
    steps = max(config.steps, 10 * _TIMED)
    trial = replace(config, steps=steps, max_minutes=None, save_every=steps, val_every=steps)
    batches.batches = max(batches.batches, (_TIMED + 1) * config.accumulation)
    timer = _Timer()
    with tempfile.TemporaryDirectory(prefix="looptx-") as folder:
        fit(model, batches, trial, folder=Path(folder), advice="run it again", callbacks=[timer])
    return (timer.ends[-1] - timer.ends[0]) / _TIMED


class _RandomTokens(Dataset[dict[str, Tensor]]):
    """Sequences of random tokens, which take as long as those of a text."""

    def __init__(self, count: int, length: int, vocab_size: int) -> None:
        self.count, self.length, self.vocab_size = count, length, vocab_size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """tokens: (length + 1,). ids: the number. documents: (length,), all the same one."""
        draw = torch.Generator().manual_seed(index)
        return {
            "tokens": torch.randint(self.vocab_size, (self.length + 1,), generator=draw),
            "ids": torch.tensor(index % self.count),
            "documents": torch.zeros(self.length, dtype=torch.int64),
        }


class _Timer(L.Callback):
    """When the optimizer's steps ended; it stops the run after the last one that is timed."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step > len(self.ends):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
        trainer.should_stop = len(self.ends) > _TIMED
