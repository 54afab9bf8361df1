"""Rotary position embedding (RoPE, arXiv 2104.09864), in the half-split layout.

Selective: a position has one coordinate or several, such as time, row and column, and
frequency i turns by coordinate i modulo their number, so that each coordinate has high and low
ones (M-RoPE, arXiv 2409.12191, interleaved as in arXiv 2510.23095). Text stands at the same place
on every axis, for which this is ordinary RoPE. Frequencies may be scaled (`RopeScaling`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from looptx_core.config.rope import RopeScaling
from looptx_core.model.fused import can_use_fused, norm_and_rotate
from looptx_core.model.in_place import plus

Rotary = tuple[Tensor, Tensor]
"""Cosines and signed sines, each (batch or 1, length, 1, head_dim), to broadcast over heads."""


_UNSCALED = RopeScaling()


def rotary_frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling = _UNSCALED,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Radians a position, (head_dim / 2,), from the fastest to the slowest."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    plain = 1.0 / theta ** (steps / head_dim)
    if scaling.rope_type == "default":
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def rotary_tables(
    positions: Tensor,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    scaling: RopeScaling = _UNSCALED,
    far: bool = False,
) -> Rotary:
    """Tables for `rotate`.

    positions: (axes, batch or 1, length), integer; one axis where all coordinates are equal. far:
    they may exceed what float32 tells apart after a product, so angles are computed in float64.
    """
    frequencies = rotary_frequencies(head_dim, theta, scaling, positions.device)
    axis = torch.arange(len(frequencies), device=positions.device) % len(positions)
    wide = torch.float64 if far else torch.float32
    angles = positions[axis].to(wide) * frequencies[:, None, None].to(wide)
    angles = angles.permute(1, 2, 0)
    angles = angles.unsqueeze(2)
    cos, sin = angles.cos(), angles.sin()
    # The sign is in the table, so that a turn is two products and a roll.
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn queries or keys, (batch, length, heads, head_dim), to their positions."""
    cos, sin = rotary
    other = x.roll(x.shape[-1] // 2, dims=-1) * sin
    return plus(x * cos, other)


class Rotate(nn.Module):
    """`rotate` alone, where heads have no norm."""

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        if can_use_fused(x, *rotary, operation="norm and RoPE"):
            return norm_and_rotate(x, None, 0.0, *rotary)
        return rotate(x, rotary)
