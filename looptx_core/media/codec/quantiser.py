"""Finite scalar quantisation (FSQ, arXiv 2309.15505): a few numbers, each on a few levels.

A code is the sequence of its digits. Digit i has `levels[i]` values, and the first digit counts
ones, as in a number written from right to left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_MARGIN = 1e-3  # how far the range goes beyond the outer levels, so that these are reached


def strides_of(levels: Sequence[int]) -> list[int]:
    """What one step of each digit counts in a code."""
    return [math.prod(levels[:place]) for place in range(len(levels))]


def digits_of(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """The digits of codes (...): (..., digits), whole numbers from 0."""
    strides = torch.tensor(strides_of(levels), device=codes.device)
    return codes[..., None] // strides % torch.tensor(list(levels), device=codes.device)


def one_hot_digits(levels: Sequence[int]) -> Tensor:
    """Each code as the ones of its digits' levels side by side, (codes, sum of levels), 0 or 1.

    The sparse binary form in which discrete latents help (arXiv 2312.01203).
    """
    digits = digits_of(torch.arange(math.prod(levels)), levels)
    starts = torch.tensor([sum(levels[:place]) for place in range(len(levels))])
    return torch.zeros(len(digits), sum(levels)).scatter_(1, digits + starts, 1.0)


class Quantiser(nn.Module):
    """Brings numbers onto levels. It has no parameters, and it works in float32 throughout: in a
    narrower type numbers near the middle of two levels would go to either."""

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., digits), any numbers -> the nearest levels as numbers from -1 to 1.

        The gradient passes the rounding unchanged.
        """
        counts = self._counts(x)
        half = (counts - 1) * (1 + _MARGIN) / 2
        # An even number of levels has no middle one, so its levels are moved by a half.
        offset = (counts % 2 == 0).float() / 2
        with torch.autocast(x.device.type, enabled=False):
            shift = torch.atanh(offset / half)
            bound = torch.tanh(x.float() + shift) * half - offset
            return (bound + (bound.round() - bound).detach()) / (counts // 2)

    def codes(self, values: Tensor) -> Tensor:
        """The codes (...), of values (..., digits) as `forward` makes them."""
        middle = self._counts(values) // 2
        digits = (values.float() * middle + middle).round().long()
        return (digits * torch.tensor(strides_of(self.levels), device=values.device)).sum(-1)

    def values(self, codes: Tensor) -> Tensor:
        """The inverse of `codes`: (..., digits)."""
        middle = self._counts(codes) // 2
        return (digits_of(codes, self.levels).float() - middle) / middle

    def _counts(self, like: Tensor) -> Tensor:
        return torch.tensor(self.levels, dtype=torch.float32, device=like.device)
