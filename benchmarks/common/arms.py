"""One arm of a comparison: a small model trained for given FLOPs, and what it reached."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common.record import Row
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.datamodule import TokenData
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.evaluate import evaluate_all
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss
from looptx_core.training.optimizer import build_optimizer, clip_by_part, learning_rate_factor


def flops_per_step(model_config: ModelConfig, config: TrainConfig) -> float:
    """Mean over steps whose depths do not hang on the model."""
    model = LoopedTransformer(model_config)
    schedule = LoopSchedule(config, model_config.max_loops)
    shape = (config.batch_size, config.seq_len + 1)
    tokens = torch.randint(model_config.vocab_size, shape)
    drawn = config.loop_schedule != "fixed"
    # Depths that grow are drawn over the whole run, others at its beginning.
    stride = max(1, config.steps // 20) if config.loop_schedule == "grow" else 1
    with torch.no_grad():
        costs = [
            loop_loss(model, tokens, schedule, step * stride,
                      torch.arange(config.batch_size) + 97 * step, loss_at=config.loss_at).flops
            for step in range(20 if drawn else 1)
        ]  # fmt: skip
    return statistics.mean(costs)


def for_flops(model: ModelConfig, config: TrainConfig, flops: float) -> TrainConfig:
    """The settings with as many steps as these FLOPs pay for."""
    return replace(config, steps=max(1, round(flops / flops_per_step(model, config))))


def trained(model_config: ModelConfig, config: TrainConfig, shards: Path) -> Row:
    """Train, and measure on held-out text: what `looptx train` does, without its run's folder.

    `seconds` are those of this process on its cores, which other processes disturb little.
    """
    torch.manual_seed(config.seed)
    model = LoopedTransformer(model_config).train()
    schedule = LoopSchedule(config, model_config.max_loops)
    optimizer = build_optimizer(model, config)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(config))
    data = TokenData(
        shards, seq_len=config.seq_len, micro_batch=config.batch_size, batches=config.steps,
        val_batches=config.val_batches, seed=config.seed,
    )  # fmt: skip
    flops, loops, began = 0.0, 0.0, time.process_time()
    for step, batch in enumerate(data.train_dataloader()):
        loss = loop_loss(
            model, batch["tokens"], schedule, step, batch["ids"], documents=batch.get("documents"),
            weights=batch.get("weights"), loss_at=config.loss_at, loss_prior=config.loss_prior,
        )  # fmt: skip
        optimizer.zero_grad()
        (loss.loss + loss.confidence_loss).backward()
        clip_by_part(model, config.clip)
        optimizer.step()
        rates.step()
        flops, loops = flops + loss.flops, loops + loss.mean_loops / config.steps
    seconds = time.process_time() - began
    counts = data.shards.manifest.splits["val"]
    with torch.no_grad():
        held_out = evaluate_all(model.eval(), data.val_dataloader(), model_config.max_loops)
    return {
        "steps": config.steps,
        "tokens": config.steps * config.batch_size * config.seq_len,
        "epochs": round(config.steps * config.batch_size / len(data.train), 2),
        "mean_loops": round(loops, 2),
        "flops": flops,
        "seconds": round(seconds, 1),
        "bits_per_byte_by_loop": [
            round(x / math.log(2) * counts.tokens / counts.bytes, 4) for x in held_out.loss_by_loop
        ],
    }
