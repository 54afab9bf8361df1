"""Attention through one function with exchangeable back ends."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from looptx_core.errors import MissingError, UsageError

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(queries, keys, values, mask) -> output.

queries (batch, heads, new, head_dim); keys and values (batch, kv_heads, seen, head_dim);
mask (batch or 1, 1, new, seen), True where a query may look, or None: causal when new > 1,
everything when new == 1. The output has the queries' shape.
"""


def sdpa(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """torch's fused attention; runs everywhere."""
    batch, heads, new, width = queries.shape
    if new == 1 and keys.shape[1] != heads:
        # A single token's query heads of one key head do as well for rows of a sequence.
        grouped = queries.view(batch, keys.shape[1], -1, width)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return out.view(batch, heads, 1, width)
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None and queries.shape[2] > 1,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )


def flash(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """FlashAttention 2 (arXiv 2307.08691) by the flash-attn package; a mask goes to SDPA."""
    if mask is not None or queries.dtype not in (torch.float16, torch.bfloat16):
        return sdpa(queries, keys, values, mask)
    from flash_attn import flash_attn_func

    out = flash_attn_func(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        causal=queries.shape[2] > 1,
    )
    return out.transpose(1, 2)


def attention_weights(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """The attention's probabilities, (batch, heads, new, seen), by the explicit formula."""
    _, heads, new, width = queries.shape
    keys = keys.repeat_interleave(heads // keys.shape[1], dim=1)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(width)
    if mask is None and new > 1:
        mask = torch.ones(new, keys.shape[2], dtype=torch.bool, device=keys.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1)


def explicit(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as the textbook writes it, the reference for the others."""
    return _weighed(attention_weights(queries, keys, mask), values)


def _weighed(weights: Tensor, values: Tensor) -> Tensor:
    return weights @ values.repeat_interleave(weights.shape[1] // values.shape[1], dim=1)


class Recording:
    """An explicit back end that keeps the weights of every call, in the order of the calls.

    `weights` is a list of (batch, heads, new, seen): prelude blocks, then the core's blocks
    once per loop, then the coda's. Where gradients are on, they reach these very tensors.
    """

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        self.weights.append(attention_weights(q, k, mask))
        return _weighed(self.weights[-1], v)


@dataclass(frozen=True)
class Backend:
    """A back end and the one-line reason for its choice."""

    name: str
    attend: Attend
    reason: str


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """Resolve `auto`, `sdpa`, `flash` or `explicit` for a device and a type.

    Raises `MissingError` where `flash` is asked for by name and can't run.
    """
    if name == "sdpa":
        return Backend("sdpa", sdpa, "asked for")
    if name == "explicit":
        return Backend("explicit", explicit, "asked for")
    if name not in ("auto", "flash"):
        raise UsageError(f"--attention {name}: not one of auto, sdpa, flash, explicit")
    obstacle = _why_no_flash(device, dtype)
    if obstacle is None:
        return Backend("flash", flash, f"flash-attn is installed and runs in {dtype}")
    if name == "flash":
        raise MissingError(f"--attention flash: {obstacle}")
    return Backend("sdpa", sdpa, f"no flash-attn: {obstacle}")


def _why_no_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA GPU and the model is on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs bfloat16 or float16, not {dtype}; pass --precision bf16"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package is missing; pip install 'looptx[flash]' --no-build-isolation"
    return None
