"""The block that prelude, core and coda are stacks of."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from looptx_core.config.model import ModelConfig
from looptx_core.model.attention import Attend, sdpa
from looptx_core.model.cache import Slot
from looptx_core.model.rope import Rotary, rotate


@dataclass(frozen=True)
class Surroundings:
    """What every block of one forward pass shares, beside the state itself."""

    rotary: Rotary
    mask: Tensor | None = None
    attend: Attend = sdpa

    def rows(self, index: Tensor | slice) -> Surroundings:
        """The same for some of the batch's rows; index is a slice or (rows,)."""

        def pick(x: Tensor) -> Tensor:
            return x if x.shape[0] == 1 else x[index]

        cos, sin = self.rotary
        mask = None if self.mask is None else pick(self.mask)
        return Surroundings((pick(cos), pick(sin)), mask, self.attend)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with RoPE."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        width, kv_width = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
        self.q_proj = nn.Linear(config.d_model, width, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.d_model, bias=False)
        norm = nn.RMSNorm if config.qk_norm else _identity
        self.q_norm = norm(config.head_dim, eps=config.norm_eps)
        self.k_norm = norm(config.head_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, around: Surroundings, slot: Slot | None) -> Tensor:
        batch, length, _ = x.shape
        queries = self.q_proj(x).view(batch, length, self.heads, self.head_dim)
        keys = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim)
        values = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        queries = rotate(self.q_norm(queries).transpose(1, 2), around.rotary)
        keys = rotate(self.k_norm(keys).transpose(1, 2), around.rotary)
        if slot is not None:
            keys, values = slot.extend(keys, values)
        out = around.attend(queries, keys, values, around.mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class GeGLU(nn.Module):
    """down(gelu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Apart, not fused: the backward of a split copies both halves.
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm attention and GeGLU, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = GeGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, around: Surroundings, slot: Slot | None = None) -> Tensor:
        """x: (batch, length, d_model), and so the result."""
        x = x + self.dropout(self.attention(self.attention_norm(x), around, slot))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


def _identity(_width: int, eps: float) -> nn.Module:
    return nn.Identity()
