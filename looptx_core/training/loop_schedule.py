"""How deep each sequence goes in training.

Depths are functions of (seed, step, sample id) or of losses that all ranks share, so that a
resumed run repeats them and every rank runs the same loops.

- `fixed`: every sequence runs the same number of loops.
- `sampled`: each sequence draws its depth from a log-normal Poisson distribution, truncated to
  1..max (Huginn, arXiv 2502.05171; drawn per sequence as in Parcae, arXiv 2604.12946).
- `loss`: the original design's rule. All sequences run the base depth; those that still have
  loss to lose go on, to a depth drawn as above. Three amendments keep the deeper loops honest,
  which the plain rule starves: what counts is the loss that one more loop is predicted to remove
  (by the confidence head; noise can't be thought away), a share of the other sequences goes
  deeper at random, and a sequence that goes on keeps its loss at the base depth, so that the
  base never forgets the hard ones.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from looptx_core.config.run import TrainConfig
from looptx_core.errors import UsageError

_DEPTH_SPREAD = 0.5  # sigma of the log-normal rate, Huginn's
_THRESHOLD_MEMORY = 0.98  # of the running quantile, about the last fifty steps


class LoopSchedule(torch.nn.Module):
    """Draws depths; `loss` also keeps its running threshold, in the checkpoint as a buffer."""

    threshold: Tensor

    def __init__(self, config: TrainConfig, model_max_loops: int) -> None:
        super().__init__()
        self.kind = config.loop_schedule
        self.seed = config.seed
        self.max_loops = config.max_loops or model_max_loops
        if self.max_loops > model_max_loops:
            raise UsageError(
                f"--max-loops {self.max_loops} exceeds the model's max_loops ({model_max_loops})"
            )
        self.base = config.loops or (self.max_loops if self.kind == "fixed" else 1)
        if self.base > self.max_loops:
            raise UsageError(f"--loops {self.base} exceeds max_loops ({self.max_loops})")
        self.mean_loops = config.mean_loops
        self.by_gain = config.deeper_by == "gain"
        self.fixed_threshold = config.loss_threshold
        self.deeper_share = config.deeper_share
        self.explore = config.explore
        self.register_buffer("threshold", torch.tensor(float("nan")))

    def draw(self, step: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Depths (batch,), int64, and which sequences explore (batch,), bool.

        For `loss` the depth is where a sequence goes *if* it goes deeper than the base.
        """
        low = min(self.base + 1, self.max_loops) if self.kind == "loss" else 1
        depths, explores = [], []
        for sample in ids.tolist():
            rng = np.random.default_rng((self.seed, step, sample))
            depths.append(self._depth(rng, low))
            explores.append(rng.random() < self.explore)
        return torch.tensor(depths), torch.tensor(explores)

    def _depth(self, rng: np.random.Generator, low: int) -> int:
        if self.kind == "fixed":
            return self.base
        while True:  # truncation by rejection keeps the shape
            rate = np.exp(rng.normal(np.log(self.mean_loops) - _DEPTH_SPREAD**2 / 2, _DEPTH_SPREAD))
            depth = 1 + int(rng.poisson(max(rate - 1, 0)))
            if low <= depth <= self.max_loops:
                return depth

    def goes_deeper(self, losses: Tensor, gains: Tensor, explores: Tensor) -> Tensor:
        """Which sequences, (batch,), leave the base depth behind.

        losses, gains: nats a token of each sequence of this rank, (batch,): the loss at the base
        depth, and what the next loop is predicted to take off it.
        """
        losses = gains if self.by_gain else losses
        if self.fixed_threshold is not None:
            return (losses > self.fixed_threshold) | explores
        quantile = _over_ranks(torch.quantile(losses.float(), 1 - self.deeper_share))
        if self.training:
            old = torch.where(self.threshold.isnan(), quantile, self.threshold)
            self.threshold.copy_(_THRESHOLD_MEMORY * old + (1 - _THRESHOLD_MEMORY) * quantile)
        return (losses > self.threshold) | explores


def _over_ranks(value: Tensor) -> Tensor:
    """The mean over ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value
