"""Matrix products of one input by several weights, each with a low-rank adapter or without.

What training on a CPU takes in place of linear layers one by one. The gradient of the input is
accumulated inside the matrix products, adapters of one input share a product with it, and nothing
is computed or kept for weights that are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from looptx_core.model.fused import can_use_fused, product_type


@dataclass(frozen=True)
class Product:
    """x -> weight x + scale * up (down x); weight: (d_out, d_in)."""

    weight: Tensor
    down: Tensor | None = None
    """(rank, d_in); None for no adapter."""
    up: Tensor | None = None
    """(d_out, rank)"""
    scale: float = 1.0


def product_of(layer: nn.Module) -> Product | None:
    """The product that a linear layer is, if it is no more than that.

    A layer of another class says so by a method `as_product`, which returns it or None. A layer
    with hooks has none: ZeRO-3 gathers weights in module hooks, and a weight that is touched
    outside of them would stay gathered.
    """
    if layer._forward_pre_hooks or layer._forward_hooks:
        return None
    if type(layer) is nn.Linear:
        return Product(layer.weight) if layer.bias is None else None
    own: Callable[[], Product | None] | None = getattr(layer, "as_product", None)
    return own() if own else None


def take_products(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...] | None:
    """The output of each layer for x (..., d_in); None where the layers have to be called.

    Under autocast a weight that trains is left to its layer, as autocast casts it once for all
    loops.
    """
    if not can_use_fused(x, operation="products"):
        return None
    products = [product_of(layer) for layer in layers]
    found = [product for product in products if product is not None]
    trained = any(product.weight.requires_grad for product in found)
    if len(found) < len(products) or (trained and product_type() != torch.float32):
        return None
    return multi_linear(x, found)


def multi_linear(x: Tensor, products: Sequence[Product]) -> tuple[Tensor, ...]:
    """x (..., d_in) by each product, (..., d_out) each, in autocast's type or x's."""
    parts = (part for one in products for part in (one.weight, one.down, one.up))
    return _Products.apply(x, [one.scale for one in products], *parts)


class _Products(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: list[float], *parts: Tensor | None) -> Any:
        kind = product_type() if torch.is_autocast_enabled("cpu") else x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(kind)
        weights, downs, ups = ([None if part is None else part.to(kind) for part in parts[i::3]]
                               for i in range(3))  # fmt: skip
        adapted = [i for i, down in enumerate(downs) if down is not None]
        hidden = _hidden(flat, [downs[i] for i in adapted])
        outs = [torch.mm(flat, weight.T) for weight in weights if weight is not None]
        for i, narrow in zip(adapted, hidden):
            up = ups[i]
            assert up is not None
            outs[i].addmm_(narrow, up.T, alpha=scales[i])
        wants_x, _, *wants = ctx.needs_input_grad
        ctx.scales, ctx.adapted, ctx.shape = scales, adapted, x.shape
        ctx.wants, ctx.count = wants, len(weights)
        ctx.save_for_backward(
            flat if any(wants[0::3]) or any(wants[1::3]) else None,
            *(weights if wants_x else [None] * len(weights)),
            *downs, *ups, *hidden,
        )  # fmt: skip
        return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        flat, *saved = ctx.saved_tensors
        count, adapted, wants = ctx.count, ctx.adapted, ctx.wants
        weights, downs, ups = (saved[i * count : (i + 1) * count] for i in range(3))
        hidden = dict(zip(adapted, saved[3 * count :]))
        pulls = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        narrow = [torch.mm(pulls[i], ups[i]).mul_(ctx.scales[i]) for i in adapted]
        joined = torch.cat(narrow, 1) if narrow else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(pulls[0], weights[0])
            for pull, weight in zip(pulls[1:], weights[1:]):
                dx.addmm_(pull, weight)
            if joined is not None:
                dx.addmm_(joined, torch.cat([downs[i] for i in adapted]))
            dx = dx.view(ctx.shape)
        gradients: list[Tensor | None] = [None] * (3 * count)
        for i in range(count):
            if wants[3 * i]:
                gradients[3 * i] = pulls[i].T @ flat
        if joined is not None and any(wants[1::3]):
            each = (joined.T @ flat).split([downs[i].shape[0] for i in adapted])
            for i, ddown in zip(adapted, each):
                gradients[3 * i + 1] = ddown
        for i in adapted:
            if wants[3 * i + 2]:
                gradients[3 * i + 2] = (pulls[i].T @ hidden[i]).mul_(ctx.scales[i])
        return dx, None, *gradients


def _hidden(flat: Tensor, downs: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """flat (tokens, d_in) by each of `downs`, in one product."""
    found = [down for down in downs if down is not None]
    if not found:
        return []
    return torch.mm(flat, torch.cat(found).T).split([len(down) for down in found], 1)
