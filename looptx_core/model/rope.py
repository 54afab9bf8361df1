"""Rotary position embedding (RoPE, arXiv 2104.09864), in the half-split layout."""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and signed sines, each (batch or 1, length, 1, head_dim), to broadcast over heads."""


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Tables for `rotate`.

    positions: (batch or 1, length), integer. One coordinate serves every frequency here; a
    token with several coordinates (row, column, time) would assign frequencies to coordinates
    in this function and nowhere else.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (exponents / head_dim)
    angles = positions[..., None].float() * frequencies
    angles = angles.unsqueeze(2)
    cos, sin = angles.cos(), angles.sin()
    # The sign is in the table, so that a turn is two products and a roll.
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn queries or keys, (batch, length, heads, head_dim), to their positions."""
    cos, sin = rotary
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
