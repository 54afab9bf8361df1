"""Frozen weights in the type that autocast computes in, so that no step casts them again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from looptx_core.model.loop import LoopedTransformer


def cast_frozen(model: LoopedTransformer, kind: torch.dtype) -> LoopedTransformer:
    """The model, with the matrices of frozen linear layers in `kind`, in place.

    Under autocast the products are the same to the bit; DoRA takes its norms of the rounded
    weights. Outside of autocast the model is not meant to run. An embedding stays as it is; a head
    that is tied to it gets a matrix of its own.
    """
    for module in _frozen_linears(model):
        if module.weight.dtype != kind:
            module.weight = nn.Parameter(module.weight.to(kind), requires_grad=False)
    return model


def cast_bytes(model: LoopedTransformer, kind: torch.dtype) -> int:
    """Bytes that `cast_frozen` adds to the weights; negative where they become fewer."""
    table = model.embedding.weight
    return sum(
        layer.weight.numel()
        * (kind.itemsize - (0 if layer.weight is table else layer.weight.element_size()))
        for layer in _frozen_linears(model)
        if layer.weight.dtype != kind
    )


def _frozen_linears(model: LoopedTransformer) -> Iterator[nn.Linear]:
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            yield module
