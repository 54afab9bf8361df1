"""Weights stored as int8, with a float scale for each row, to run.

    w = weight * weight_scale

A row's scale is its largest absolute value over 127. Activations stay floats. The names are those
of compressed-tensors, vLLM's format.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 127
_SMALLEST = 1e-12


def int8_by_row(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers from -127 to 127, as floats; their scales, (rows, 1)), weight: (rows, n)."""
    scale = weight.detach().abs().amax(1, keepdim=True).clamp(min=_SMALLEST) / LEVELS
    return (weight.detach() / scale).round(), scale


class _Rows(nn.Module):
    """A matrix by rows: `weight`, (rows, width) int8, and `weight_scale`, (rows, 1)."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(rows, width, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(rows, 1))

    def as_float(self) -> Tensor:
        """The numbers that are meant, (rows, width), in the scales' type."""
        return self.weight.to(self.weight_scale.dtype) * self.weight_scale

    def extra_repr(self) -> str:
        return "{} x {}, 8 bits a weight".format(*self.weight.shape)


class Int8Linear(_Rows):
    """A linear layer without a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(out_features, in_features)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features)."""
        # Scaled afterwards: a product for each output, and none for each weight.
        return F.linear(x, self.weight.to(x.dtype)) * self.weight_scale.to(x.dtype).mT


class Int8Embedding(_Rows):
    """A row for each token."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (...) int64 -> (..., width)."""
        scale = F.embedding(tokens, self.weight_scale)
        return F.embedding(tokens, self.weight).to(scale.dtype) * scale
