"""Lightning's Trainer as a run of looptx uses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import Strategy

from looptx_core.config.run import RunConfig
from looptx_core.training.callbacks import Checkpoints, JsonLines, WholeFiles


def build_trainer(
    config: RunConfig,
    last_step: int,
    folder: Path,
    precision: str,
    device: torch.device,
    strategy: Strategy | str,
    callbacks: Sequence[L.Callback],
    metrics: JsonLines,
    trackers: Sequence[Logger] = (),
) -> L.Trainer:
    """A Trainer that ends after `last_step`, with its checkpoints and logs in `folder`.

    precision: 'bf16' or 'float32'. metrics: writes the run's own log; trackers: get it too.
    """
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=config.devices,
        num_nodes=config.nodes,
        strategy=strategy,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_steps=last_step,
        accumulate_grad_batches=config.accumulation,
        gradient_clip_val=config.clip,
        val_check_interval=config.val_every * config.accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=config.log_every,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[WholeFiles()],
        callbacks=[
            *callbacks,
            Checkpoints(folder / "checkpoints", config.save_every, config.keep),
        ],
        logger=[
            metrics,
            CSVLogger(folder, name=None, version="csv"),
            TensorBoardLogger(folder, name=None, version="tensorboard"),
            *trackers,
        ],
    )
