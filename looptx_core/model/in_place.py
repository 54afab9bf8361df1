"""Sums and products that take no new memory where no gradient is kept: new memory takes time."""

from __future__ import annotations

import torch
from torch import Tensor


def plus(made: Tensor, other: Tensor) -> Tensor:
    """made + other, in the memory of `made` where that gives the same; nobody else holds it."""
    return made.add_(other) if _fits(made, other) else made + other


def times(made: Tensor, other: Tensor) -> Tensor:
    """made * other, as `plus`."""
    return made.mul_(other) if _fits(made, other) else made * other


def _fits(made: Tensor, other: Tensor) -> bool:
    return not torch.is_grad_enabled() and torch.result_type(made, other) == made.dtype
