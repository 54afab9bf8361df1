"""How deep each sequence goes in training.

Depths are functions of (seed, step, sample id) or of losses that all ranks share, so that a
resumed run repeats them and every rank runs the same loops.

- `fixed`: every sequence runs the same number of loops.
- `sampled`: each sequence draws its depth from a log-normal Poisson distribution, truncated to
  base..max (Huginn, arXiv 2502.05171; drawn per sequence as in Parcae, arXiv 2604.12946).
- `grow`: drawn likewise, but mean and maximum rise linearly from the base depth over the first
  `grow_share` of the steps. Early steps cost less, and a pretrained model that knows one loop is
  led to more (a curriculum over depth, arXiv 2511.07384).
- `loss`: the original design's rule. All sequences run the base depth; those with much loss left
  go deeper, to a depth drawn as above. The plain rule trains some depths too little, so there are
  two amendments. The measure is not the loss itself but how much of it one more loop is predicted
  to remove; the confidence head predicts this from the state alone, which ignores loss that no
  loop can remove and costs no product with the vocabulary. And a share of the sequences draws its
  depth regardless.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from looptx_core.config.run import RunConfig
from looptx_core.errors import UsageError
from looptx_core.model.depths import sample_depth
from looptx_core.parallel.ranks import mean_over_ranks

_THRESHOLD_MEMORY = 0.9  # decay of the running quantile, about ten steps, because losses fall fast


class LoopSchedule(torch.nn.Module):
    """Draws the depth of each sequence.

    `threshold` is the running threshold of the kind `loss`, a buffer so that checkpoints have it.

    Raises `UsageError` for depths that exceed the model's `max_loops` or each other.
    """

    threshold: Tensor

    def __init__(self, config: RunConfig, model_max_loops: int) -> None:
        super().__init__()
        self.kind = config.loop_schedule
        self.seed = config.seed
        self.max_loops = config.max_loops or model_max_loops
        if self.max_loops > model_max_loops:
            raise UsageError(
                f"`max_loops` {self.max_loops} exceeds the model's max_loops ({model_max_loops})"
            )
        self.base = config.loops or (self.max_loops if self.kind == "fixed" else 1)
        if self.base > self.max_loops:
            raise UsageError(f"`loops` {self.base} exceeds max_loops ({self.max_loops})")
        self.mean_loops = config.mean_loops
        self.growing_steps = config.grow_share * config.steps if self.kind == "grow" else 0.0
        self.by = config.deeper_by
        self.fixed_threshold = config.loss_threshold
        self.deeper_share = config.deeper_share
        self.explore = config.explore
        self.register_buffer("threshold", torch.tensor(float("nan")))

    def depths(self, step: int, ids: Tensor, measure: Callable[[str], Tensor]) -> Tensor:
        """The depth of each sequence, (batch,), int64.

        ids: (batch,), the samples' numbers. measure: returns each sequence's "gain" or "loss" after
        the base depth, (batch,), nats a token; only the kind `loss` calls it.
        """
        if self.kind == "fixed":
            return torch.full(ids.shape, self.base)
        draws = [np.random.default_rng((self.seed, step, sample)) for sample in ids.tolist()]
        mean, most = self._range_at(step)
        sampled = torch.tensor([sample_depth(rng, mean, self.base, most) for rng in draws])
        if self.kind in ("sampled", "grow") or self.base == self.max_loops:
            return sampled
        deeper = torch.tensor([sample_depth(rng, mean, self.base + 1, most) for rng in draws])
        explores = torch.tensor([rng.random() < self.explore for rng in draws])
        by_rule = torch.where(self._above_threshold(measure(self.by)), deeper, self.base)
        return torch.where(explores, sampled, by_rule)

    @property
    def deepest(self) -> int:
        """The deepest depth that training runs."""
        return self.base if self.kind == "fixed" else self.max_loops

    def first_read(self, loss_at: str) -> int:
        """The earliest loop that training reads out. loss_at: last, pair or all."""
        return {"last": self.base, "pair": max(1, self.base - 1), "all": 1}[loss_at]

    def _range_at(self, step: int) -> tuple[float, int]:
        """The mean and the maximum of the depths that are drawn at a step."""
        if step >= self.growing_steps:
            return self.mean_loops, self.max_loops
        grown = step / self.growing_steps
        mean = self.base + max(0.0, self.mean_loops - self.base) * grown
        return mean, self.base + math.floor((self.max_loops - self.base + 1) * grown)

    def _above_threshold(self, values: Tensor) -> Tensor:
        if self.fixed_threshold is not None:
            return (values > self.fixed_threshold).cpu()
        # On the values' device, as NCCL can't reduce on a CPU, where ZeRO keeps this buffer.
        quantile = mean_over_ranks(torch.quantile(values.float(), 1 - self.deeper_share))
        quantile = quantile.to(self.threshold.device)
        if self.training:
            old = torch.where(self.threshold.isnan(), quantile, self.threshold)
            self.threshold.copy_(_THRESHOLD_MEMORY * old + (1 - _THRESHOLD_MEMORY) * quantile)
        return (values > self.threshold.to(values.device)).cpu()
