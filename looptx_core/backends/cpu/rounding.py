"""Weights as the kernel holds them, rounded, and products whose inputs are rounded too."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from looptx_core.backends.torch_backend import TorchPass
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


_lock = threading.Lock()
_setting = ""  # torch's own, while at least one pass is in bf16
_passes = 0


@contextmanager
def products_in_bf16() -> Iterator[None]:
    """Let torch round both sides of float32 products on a CPU to bf16; sums stay float32.

    Only oneDNN's products for processors with bf16 matrices (AMX) do, at several times the speed,
    and each row comes out the same whatever rows are beside it. Others compute as before. The
    setting is the process's: while a pass runs, it holds for other threads too. The last pass to
    end puts back what was set before the first.
    """
    global _setting, _passes
    products = getattr(torch.backends.mkldnn, "matmul", None)
    if products is None:  # torch 2.8
        yield
        return
    with _lock:
        if not _passes:
            _setting, products.fp32_precision = products.fp32_precision, "bf16"
        _passes += 1
    try:
        yield
    finally:
        with _lock:
            _passes -= 1
            if not _passes:
                products.fp32_precision = _setting


class RoundedPass(TorchPass):
    """A pass over many tokens of a model with rounded weights, by `products_in_bf16`."""

    @products_in_bf16()
    def embed(self, tokens: Tensor) -> Tensor:
        return super().embed(tokens)

    @products_in_bf16()
    def iterate(
        self, state: Tensor, embedding: Tensor, loops: Sequence[int], count: int = 1
    ) -> Tensor:
        return super().iterate(state, embedding, loops, count)

    @products_in_bf16()
    def logits(self, state: Tensor, last: bool = False) -> Tensor:
        return super().logits(state, last)

    @products_in_bf16()
    def backfill(self, state: Tensor, embedding: Tensor, loops: Sequence[int]) -> None:
        super().backfill(state, embedding, loops)


def all_blocks(model: LoopedTransformer) -> list[Block]:
    return [*model.prelude, *model.core, *model.coda]


def block_layers(block: Block) -> list[nn.Module]:
    a, m = block.attention, block.mlp
    return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]
