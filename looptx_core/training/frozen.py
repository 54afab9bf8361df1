"""Frozen weights in the type that autocast computes in, so that no step casts them again."""

from __future__ import annotations

import torch
from torch import nn

from looptx_core.model.loop import LoopedTransformer


def cast_frozen(model: LoopedTransformer, kind: torch.dtype) -> LoopedTransformer:
    """The model, with the matrices of frozen linear layers in `kind`, in place.

    Under autocast the products are the same to the bit; DoRA takes its norms of the rounded
    weights. Outside of autocast the model is not meant to run. An embedding stays as it is; a head
    that is tied to it gets a matrix of its own.
    """
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.requires_grad:
            continue
        if module.weight.dtype != kind:
            module.weight = nn.Parameter(module.weight.to(kind), requires_grad=False)
    return model
