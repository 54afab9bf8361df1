"""AdamW with weight decay on matrices only, warm-up and cosine, and clipping by part."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from looptx_core.config.run import TrainConfig
from looptx_core.model.loop import LoopedTransformer


def build_optimizer(model: LoopedTransformer, config: TrainConfig) -> torch.optim.AdamW:
    """Two groups: matrices, which decay, and vectors, which do not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


def learning_rate_factor(config: TrainConfig) -> Callable[[int], float]:
    """Step -> share of the peak: a linear warm-up, then a cosine down to `min_lr`."""
    warmup = max(1, round(config.warmup * config.steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, config.steps - warmup))
        return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def clip_by_part(model: LoopedTransformer, limit: float) -> torch.Tensor:
    """Clip the trunk's and the confidence head's gradients apart; return the trunk's norm.

    A common norm would let the head's gradient scale the trunk's steps.
    """
    torch.nn.utils.clip_grad_norm_(model.confidence.parameters(), limit)
    return torch.nn.utils.clip_grad_norm_(model.trunk_parameters(), limit)
