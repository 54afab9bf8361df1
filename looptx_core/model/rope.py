"""Rotary position embedding (RoPE, arXiv 2104.09864), in the half-split layout."""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each (batch or 1, 1, length, head_dim), ready to broadcast over heads."""


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Tables for `rotate`.

    positions: (batch or 1, length), integer. One coordinate serves every frequency here; a
    token with several coordinates (row, column, time) would assign frequencies to coordinates
    in this function and nowhere else.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (exponents / head_dim)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn queries or keys, (batch, heads, length, head_dim), to their positions."""
    cos, sin = rotary
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
