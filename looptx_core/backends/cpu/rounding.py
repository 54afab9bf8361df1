"""Weights as the kernel holds them: rounded, and what they take."""

from __future__ import annotations

import copy

import torch
from torch import nn

from looptx_core.model.block import Block
from looptx_core.model.int8 import int8_by_row
from looptx_core.model.loop import LoopedTransformer


@torch.no_grad()
def round_weights(model: LoopedTransformer, precision: str) -> None:
    """Give the model the values that the kernel will hold, so that both compute the same."""
    layers = [layer for block in all_blocks(model) for layer in block_layers(block)]
    bridge = getattr(model.injection, "bridge", None)
    for layer in (*layers, model.head, bridge):
        if not isinstance(layer, nn.Linear):
            continue
        if precision == "bf16":
            layer.weight.copy_(layer.weight.bfloat16())
        elif precision == "int8":
            values, scale = int8_by_row(layer.weight)
            layer.weight.copy_(values * scale)


def rounded_copy(model: LoopedTransformer, precision: str) -> LoopedTransformer:
    """A copy with the values that the kernel will hold; in float32 the model itself."""
    if precision == "float32":
        return model
    copied = copy.deepcopy(model)
    copied.fuse_projections()  # the copied projections were still those of the model
    round_weights(copied, precision)
    return copied


def all_blocks(model: LoopedTransformer) -> list[Block]:
    return [*model.prelude, *model.core, *model.coda]


def block_layers(block: Block) -> list[nn.Module]:
    a, m = block.attention, block.mlp
    return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]
