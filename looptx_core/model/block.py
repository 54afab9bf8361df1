"""The transformer block; prelude, core and coda are stacks of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looptx_core.config.model import ModelConfig
from looptx_core.model.attention import Attend, VarlenBatch, sdpa
from looptx_core.model.bitnet import BitLinear, IntegerProduct, TernaryLinear
from looptx_core.model.cache import CacheView
from looptx_core.model.fused import can_use_fused, gated
from looptx_core.model.in_place import plus, times
from looptx_core.model.int8 import Int8Linear
from looptx_core.model.layer_state import Attended
from looptx_core.model.memory import LayerMemory, Remembered, without_rope
from looptx_core.model.norm import AllHeadsNorm, HeadNorm, RMSNorm
from looptx_core.model.products import take_products
from looptx_core.model.rope import Rotary, Rotate


class Past(Protocol):
    """What one layer remembers at one loop: of a cache, or of whole rows that run by blocks."""

    def update(self, keys: Tensor, values: Tensor, mask: Tensor | VarlenBatch | None) -> Attended:
        """See `LayerState.update`."""

    def remembered(self) -> Remembered | None:
        """See `LayerState.remembered`."""


class Segment(Protocol):
    """The past of a block of whole rows, see `looptx_core.model.segments`."""

    def core(self, layer: int, loop: int | Tensor) -> Past:
        """A core layer's at a loop."""


@dataclass(frozen=True)
class ForwardContext:
    """What all blocks share in one forward pass: rotary tables, mask, attention and cache view."""

    rotary: Rotary
    mask: Tensor | VarlenBatch | None = None
    attend: Attend = sdpa
    view: CacheView | None = None
    """The columns of a cache that these tokens fill; None without a cache."""
    segment: Segment | None = None
    """What these tokens attend to where they are a block of whole rows; else None."""
    documents: Tensor | None = None
    """(rows, length), numbers, where a memory has to tell documents apart."""
    local: ForwardContext | None = None
    """What blocks that attend within a window have in place of this; None where all have this."""

    def rows(self, index: Tensor | slice) -> ForwardContext:
        """The context of some rows of the batch; index: a slice or (rows,). Not with a cache."""

        def pick(x: Tensor) -> Tensor:
            return x if x.shape[0] == 1 else x[index]

        cos, sin = self.rotary
        mask = self.mask
        if mask is not None:
            mask = mask[index] if isinstance(mask, VarlenBatch) else pick(mask)
        documents = None if self.documents is None else self.documents[index]
        local = None if self.local is None else self.local.rows(index)
        return replace(
            self, rotary=(pick(cos), pick(sin)), mask=mask, view=None, documents=documents,
            local=local,
        )  # fmt: skip

    def buffers(self) -> list[Tensor]:
        """The tensors that depend on where the tokens stand."""
        masks = [self.mask] if isinstance(self.mask, Tensor) else []
        return [*self.rotary, *masks, *(self.local.buffers() if self.local else [])]


class FusedProjection(nn.Module):
    """A module whose linear layers `fused_layers` read the same input.

    `fuse_projections` puts their weights into one matrix, so that one product serves all of them
    when no gradient is needed. The layers keep their usual names. Training runs them one by one,
    because the backward pass of a split would copy its parts.
    """

    fused_layers: tuple[str, ...]
    _fused: Callable[[Tensor], Tensor] | None = None

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """x (..., width) -> the output of each layer, (..., its width)."""
        if self._fused is None or torch.is_grad_enabled():
            layers = [self.get_submodule(name) for name in self.fused_layers]
            if (outputs := take_products(x, layers)) is not None:
                return outputs
            if torch.is_autocast_enabled(x.device.type) and all(
                type(layer) is nn.Linear for layer in layers
            ):
                x = x.to(torch.get_autocast_dtype(x.device.type))  # once, not for each of them
            return [layer(x) for layer in layers]
        return self._fused(x).split(self._widths, dim=-1)

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """Make the weights rows of one matrix; values, names and memory use stay the same."""
        layers = [self.get_submodule(name) for name in self.fused_layers]
        packed = [layer for layer in layers if type(layer) is TernaryLinear]
        weights = [layer.weight for layer in layers if type(layer) is nn.Linear]
        if len(packed) == len(layers):
            self._widths = [layer.out_features for layer in packed]
            self._fused = IntegerProduct(packed)
        elif len(weights) == len(layers):  # an adapter's layer does more than a product
            self._widths = [len(weight) for weight in weights]
            if _are_adjacent(weights):  # fused before: earlier references stay valid
                shape = sum(self._widths), weights[0].shape[1]
                joined = weights[0].data.as_strided(shape, (shape[1], 1))
            else:
                joined = torch.cat(weights)
                for weight, rows in zip(weights, joined.split(self._widths)):
                    weight.data = rows
            self._fused = partial(F.linear, weight=joined)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedProjection:
        self._fused = None  # a move or a cast gives each weight its own memory again
        return super()._apply(fn, recurse)


def _are_adjacent(weights: Sequence[Tensor]) -> bool:
    """Whether these are consecutive rows of one matrix, in this order."""
    first, offset = weights[0], weights[0].storage_offset()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or weight.storage_offset() != offset:
            return False
        offset += weight.numel()
    return True


def linear(config: ModelConfig, width: int, out: int, normed: bool = True) -> nn.Module:
    """A linear layer of the configured kind. normed: whether its input comes from a norm."""
    if config.linear == "float":
        return nn.Linear(width, out, bias=False)
    if config.linear == "int8":
        return Int8Linear(width, out)
    norm = nn.Identity() if normed else RMSNorm(width, config.norm_eps)
    return (BitLinear if config.linear == "ternary" else TernaryLinear)(width, out, norm)


class Attention(FusedProjection):
    """Grouped-query attention (arXiv 2305.13245) with RoPE.

    x: (batch, length, d_model), and so is the result. past: what the layer remembers of earlier
    tokens; None without a cache. remembers: whether it has a memory beyond its window.
    """

    fused_layers = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: ModelConfig, remembers: bool = False) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
        normed = config.norm_position != "after"
        self.q_proj = linear(config, config.d_model, width, normed)
        self.k_proj = linear(config, config.d_model, kv_width, normed)
        self.v_proj = linear(config, config.d_model, kv_width, normed)
        self.o_proj = linear(config, width, config.d_model, normed=False)
        # Beside the layers, so that layers of any kind of storage can have them.
        self.q_bias, self.k_bias, self.v_bias = (
            nn.Parameter(torch.zeros(size)) if config.qkv_bias else None
            for size in (width, kv_width, kv_width)
        )
        self.q_norm = _rotate_heads(config, config.n_heads)
        self.k_norm = _rotate_heads(config, config.n_kv_heads)
        self.memory = LayerMemory(config) if remembers else None

    def forward(self, x: Tensor, ctx: ForwardContext, past: Past | None) -> Tensor:
        batch, length, _ = x.shape
        queries, keys, values = (
            _with_bias(part, bias).view(batch, length, -1, self.head_dim)
            for part, bias in zip(self.project(x), (self.q_bias, self.k_bias, self.v_bias))
        )
        turned = self.q_norm(queries, ctx.rotary)
        queries = turned.transpose(1, 2)
        keys = self.k_norm(keys, ctx.rotary).transpose(1, 2)
        values = values.transpose(1, 2)
        mask = ctx.mask
        if past is not None:
            keys, values, mask = past.update(keys, values, mask)
        out = ctx.attend(queries, keys, values, mask)
        if self.memory is not None and past is not None:
            remembered = past.remembered()
            if remembered is not None:
                plain = without_rope(turned, ctx.rotary).transpose(1, 2)
                out = self.memory(out, x, plain, remembered)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))

    def entries(self, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """The keys and values that `forward` writes, (batch, kv_heads, length, head_dim)."""
        keys, values = (
            _with_bias(layer(x), bias).view(*x.shape[:2], -1, self.head_dim)
            for layer, bias in ((self.k_proj, self.k_bias), (self.v_proj, self.v_bias))
        )
        return self.k_norm(keys, ctx.rotary).transpose(1, 2), values.transpose(1, 2)


class GeGLU(FusedProjection):
    """down(gelu(gate(x)) * up(x)), arXiv 2002.05202; SwiGLU if the activation is silu."""

    fused_layers = ("gate_proj", "up_proj")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        activation: dict[str, Callable[[Tensor], Tensor]] = {
            "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu,
        }  # fmt: skip
        self.activation = activation[config.activation]
        normed = config.norm_position != "after"
        self.gate_proj = linear(config, config.d_model, config.d_ff, normed)
        self.up_proj = linear(config, config.d_model, config.d_ff, normed)
        self.down_proj = linear(config, config.d_ff, config.d_model, normed=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x)
        if self.activation in (F.gelu, F.silu) and can_use_fused(gate, up, operation="gate"):
            return self.down_proj(gated(gate, up, self.activation is F.silu))
        return self.down_proj(times(self.activation(gate), up))


class Block(nn.Module):
    """Attention and GeGLU with their norms, each added to the residual stream.

    remembers: see `Attention`. local: whether it attends within the configured window.
    """

    def __init__(self, config: ModelConfig, remembers: bool = False, local: bool = False) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, remembers)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = GeGLU(config)
        self.dropout = nn.Dropout(config.dropout)
        self.norms_after, self.local = config.norm_position == "after", local
        self.attention_post_norm, self.mlp_post_norm = (
            RMSNorm(config.d_model, config.norm_eps)
            if config.norm_position == "both"
            else nn.Identity()
            for _ in range(2)
        )

    def forward(self, x: Tensor, ctx: ForwardContext, past: Past | None = None) -> Tensor:
        """x: (batch, length, d_model), and so is the result. past: see `Attention`."""
        ctx = self._own(ctx)
        if self.norms_after:
            x = x + self.dropout(self.attention_norm(self.attention(x, ctx, past)))
            return x + self.dropout(self.mlp_norm(self.mlp(x)))
        attended = self.attention(self.attention_norm(x), ctx, past)
        x = plus(self.dropout(self.attention_post_norm(attended)), x)
        return plus(self.dropout(self.mlp_post_norm(self.mlp(self.mlp_norm(x)))), x)

    def entries(self, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """`Attention.entries` for what enters the block, (batch, length, d_model)."""
        x = x if self.norms_after else self.attention_norm(x)
        return self.attention.entries(x, self._own(ctx))

    def _own(self, ctx: ForwardContext) -> ForwardContext:
        return ctx.local if self.local and ctx.local is not None else ctx


def _with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


def _rotate_heads(config: ModelConfig, heads: int) -> nn.Module:
    """Applies RoPE to the heads of queries or keys, with a norm before it if so configured."""
    if not config.qk_norm:
        return Rotate()
    if config.qk_norm_over == "all":
        return AllHeadsNorm(heads * config.head_dim, config.norm_eps)
    return HeadNorm(config.head_dim, config.norm_eps)
