"""Batches for Lightning's Trainer, which goes on at any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from looptx_core.data.batches import SeededBatches, Sequences, held_out, loader, text_windows
from looptx_core.data.shards import Shards, open_shards


class Batches(L.LightningDataModule):
    """Train and validation batches of sequences, resumable at any batch.

    micro_batch: sequences a batch on one device. batches: batches of the whole run.
    """

    def __init__(
        self,
        train: Sequences,
        val: Sequences,
        *,
        micro_batch: int,
        batches: int,
        val_batches: int = 8,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.micro_batch, self.batches, self.workers = micro_batch, batches, workers
        self.seed = seed
        self.val_sequences = min(len(val), val_batches * micro_batch)
        self._done = 0

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        batches = SeededBatches(
            len(self.train), self.micro_batch, self.batches, self.seed, rank, world
        )
        batches.start = self._done
        dataset = cast(Dataset[dict[str, Tensor]], self.train)
        return loader(dataset, workers=self.workers, seed=self.seed, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.held_out(self.val)

    def held_out(self, val: Sequences) -> DataLoader[dict[str, Tensor]]:
        """Batches spread over all of `val`, or of a part of it, the same each time."""
        return held_out(
            val, self.val_sequences, self.micro_batch, workers=self.workers, seed=self.seed
        )

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"batches": self.trainer.global_step * self.trainer.accumulate_grad_batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done = int(state["batches"])


class TokenData(Batches):
    """Batches of a shard folder; the other arguments are those of `Batches`."""

    def __init__(
        self,
        folder: str | Path,
        *,
        seq_len: int,
        document_mask: bool = True,
        **how: Any,
    ) -> None:
        self.shards: Shards = open_shards(folder, verify=True)
        self.texts = [self.shards]
        train, val = text_windows(folder, self.shards, seq_len, document_mask)
        self.val_parts: dict[str, Sequences] = {"text": val}
        super().__init__(train, val, **how)
