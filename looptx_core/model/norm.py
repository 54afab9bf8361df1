"""Root mean square normalisation (RMSNorm, arXiv 1910.07467)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looptx_core.model.fused import can_use_fused, norm_and_rotate, rms_norm
from looptx_core.model.in_place import times
from looptx_core.model.rope import Rotary, rotate


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if can_use_fused(x, operation="norm"):
            return rms_norm(x, self.weight, self.eps)
        if x.device.type != "cpu" or x.element_size() < 4:
            # torch's kernel needs the weight in x's type; autocast would change the output's type.
            with torch.autocast(x.device.type, enabled=False):
                return F.rms_norm(x, (self.width,), self.weight.to(x.dtype), self.eps)
        # On CPUs F.rms_norm is several slow kernels; vector_norm is one fast kernel.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square().add(self.width * self.eps).rsqrt()
        weight = self.weight * math.sqrt(self.width)
        return times(x * scale, weight)


class AllHeadsNorm(RMSNorm):
    """RMSNorm of all heads together, then RoPE."""

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:  # type: ignore[override]
        """x: (batch, length, heads, head_dim)."""
        return rotate(super().forward(x.flatten(-2)).view_as(x), rotary)


class HeadNorm(RMSNorm):
    """RMSNorm of each head (arXiv 2302.05442), then RoPE."""

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:  # type: ignore[override]
        """x: (batch, length, heads, head_dim)."""
        if can_use_fused(x, *rotary, operation="norm and RoPE"):
            return norm_and_rotate(x, self.weight, self.eps, *rotary)
        return rotate(super().forward(x), rotary)
