"""A model's weights in another kind of storage: floats, or int8 by rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from looptx_core.model.empty_weights import init_empty_weights
from looptx_core.model.int8 import Int8Embedding, Int8Linear, int8_by_row
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.vocabulary import tie_head

Kind = Literal["float", "ternary", "packed", "int8"]


@torch.no_grad()
def to_int8(model: LoopedTransformer) -> LoopedTransformer:
    """A copy of a float model with its blocks' matrices, embedding and head in int8."""
    new = like(model, "int8")
    state = model.state_dict()
    for name, layer in new.named_modules():
        if isinstance(layer, Int8Linear | Int8Embedding):
            values, scale = int8_by_row(state[f"{name}.weight"].float())
            state[f"{name}.weight"] = values.to(torch.int8)
            state[f"{name}.weight_scale"] = scale
    new.load_state_dict(state, assign=True)
    return finished(new, model)


@torch.no_grad()
def to_float(model: LoopedTransformer) -> LoopedTransformer:
    """The same model with float weights; one that has no int8 weights is returned itself."""
    if model.config.linear != "int8":
        return model
    new = like(model, "float")
    state = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, Int8Linear | Int8Embedding):
            state[f"{name}.weight"] = layer.as_float()
            del state[f"{name}.weight_scale"]
    new.load_state_dict(state, assign=True)
    return finished(new, model)


def like(model: LoopedTransformer, kind: Kind) -> LoopedTransformer:
    """A model of this shape on the meta device, whose matrices are of another kind."""
    with init_empty_weights():
        return LoopedTransformer(replace(model.config, linear=kind))


def finished(new: LoopedTransformer, old: LoopedTransformer) -> LoopedTransformer:
    """The new model once it has its weights, with what else the old one had."""
    new.attend = old.attend
    tie_head(new)
    return new.eval()
