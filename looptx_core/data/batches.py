"""Tokens to batches: windows over the shards, in an order that is a function of the seed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from looptx_core.data.shards import Shards, Tokens
from looptx_core.data.tokenizer import end_id
from looptx_core.errors import DataError
from looptx_core.media.batch import is_entry
from looptx_core.words import counted


class Sequences(Protocol):
    """Numbered training sequences: `tokens`, (length + 1,), `ids`, and what else a batch holds.

    Sequence `epoch * len + n` is sequence n, for data that differs from epoch to epoch.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class Windows(Dataset[dict[str, Tensor]]):
    """The stream cut into windows of seq_len inputs and their targets, without overlap.

    end: the id that ends a document, to number a window's documents; None leaves them out.
    """

    def __init__(self, tokens: Tokens, seq_len: int, end: int | None = None) -> None:
        self.tokens, self.seq_len, self.end = tokens, seq_len, end

    def __len__(self) -> int:
        return window_count(len(self.tokens), self.seq_len)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """tokens: (seq_len + 1,) int64. ids: the window's number. documents: (seq_len,)."""
        index %= len(self)
        start = index * self.seq_len
        window = self.tokens.read(start, start + self.seq_len + 1)
        item = {"tokens": torch.from_numpy(window), "ids": torch.tensor(index)}
        if self.end is not None:
            ends = item["tokens"][:-1] == self.end
            item["documents"] = ends.cumsum(0) - ends.long()  # an end belongs to what it ends
        return item


def window_count(tokens: int, seq_len: int) -> int:
    """How many windows a stream of so many tokens has."""
    return max(0, (tokens - 1) // seq_len)


class SeededBatches:
    """Batch n of a run, for any n: each epoch a permutation drawn from (seed, epoch).

    Iteration starts at batch `start`, while the length is the whole run's, as Lightning
    goes on counting where a checkpoint stopped.
    """

    def __init__(
        self, windows: int, batch: int, total: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.windows, self.batch, self.total, self.seed = windows, batch, total, seed
        self.rank, self.world = rank, world
        self.start = 0

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for number in range(self.start, self.total):
            chosen = []
            for place in range(self.batch):
                index = (number * self.world + self.rank) * self.batch + place
                if index // self.windows != epoch:
                    epoch = index // self.windows
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.windows)
                chosen.append(epoch * self.windows + int(order[index % self.windows]))
            yield chosen


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch. Items of media follow each other; a plain text among samples of packed examples
    gets what it lacks: one document, all weights 1."""
    batch = {}
    for key in dict.fromkeys(key for item in items for key in item):
        if is_entry(key):
            batch[key] = torch.cat([item[key] for item in items if key in item])
            continue
        stand_in = torch.ones if key == "weights" else torch.zeros
        length = len(items[0]["tokens"]) - 1
        like = next(item[key] for item in items if key in item)
        batch[key] = torch.stack(
            [item[key] if key in item else stand_in(length, dtype=like.dtype) for item in items]
        )
    return batch


def text_windows(
    folder: str | Path, shards: Shards, seq_len: int, document_mask: bool = True
) -> list[Windows]:
    """The windows of the training and of the validation split. Raises `DataError` for none."""
    end = end_id(shards.tokenizer) if document_mask else None
    parts = []
    for split in ("train", "val"):
        windows = Windows(shards.tokens(split), seq_len, end)
        if not len(windows):
            raise DataError(
                f"{folder}: the {split} split has {counted(len(windows.tokens), 'token')}, fewer "
                f"than one sequence of {seq_len}; add text or pass a smaller `seq_len`"
            )
        parts.append(windows)
    return parts


def held_out(val: Sequences, count: int, rows: int, **how: Any) -> DataLoader[dict[str, Tensor]]:
    """Batches of `rows` sequences, `count` in all, spread over `val`, the same each time; `how` as
    in `loader`."""
    chosen = np.linspace(0, len(val) - 1, min(len(val), count)).astype(int)
    subset = torch.utils.data.Subset(cast(Dataset[dict[str, Tensor]], val), chosen.tolist())
    return loader(subset, batch_size=rows, **how)


def _leave_signals_to_the_run(worker: int) -> None:
    """A signal to the whole group would end the workers under a run that is about to save; they
    end with it."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)


def loader(
    dataset: Dataset[dict[str, Tensor]], *, workers: int = 0, seed: int = 0, **how: Any
) -> DataLoader[dict[str, Tensor]]:
    """torch's, with this project's batches."""
    return DataLoader(
        dataset,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals_to_the_run,
        # Workers read files only; the seed is given, so that the main generator is untouched.
        generator=torch.Generator().manual_seed(seed),
        **how,
    )
