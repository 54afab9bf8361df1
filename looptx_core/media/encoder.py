"""The encoder of every medium: blocks of the decoder's own kind, after a stem of the medium's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from looptx_core.config.model import ModelConfig
from looptx_core.model.block import Block, ForwardContext
from looptx_core.model.norm import RMSNorm
from looptx_core.model.rope import rotary_tables


class Encoder(nn.Module):
    """Blocks whose rows of one item all see each other, turned by the medium's own axes.

    A subclass has the stem, whose modules come first, from a `MediaBatch` to rows of `width`, and
    the way to the decoder.
    """

    def __init__(self, config: ModelConfig, layers: int, width: int, **stem: nn.Module) -> None:
        super().__init__()
        for name, module in stem.items():
            self.add_module(name, module)
        heads = width // config.head_dim
        # Its weights stay floats where the decoder's are ternary: it runs once, not per token.
        self.config = replace(
            config,
            d_model=width,
            n_heads=heads,
            n_kv_heads=heads,
            d_ff=3 * width,
            linear="float",
        )
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(layers))
        self.norm = RMSNorm(width, config.norm_eps)

    def reset_stem(self) -> None:
        """Start weights that differ from the rule of `model.weights.draw_weights`."""

    def run(
        self, x: Tensor, positions: Tensor, there: Tensor, near: Tensor | None = None
    ) -> Tensor:
        """What the blocks make of items, normed, (items, rows, width).

        x: (items, rows, width), padded at the right. positions: (axes, items or 1, rows). there:
        (items, rows) bool, where no padding is. near: (rows, rows) bool, which rows each one sees;
        None: all.
        """
        rotary = rotary_tables(
            positions, self.config.head_dim, self.config.rope_theta, self.norm.weight.dtype
        )
        # A mask even where nothing is padded: without one attention would be causal.
        mask = there[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        ctx = ForwardContext(rotary, mask if near is None else mask & near)
        for block in self.blocks:
            x = block(x, ctx)
        return self.norm(x)


def present(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Where items of these sizes have rows once they are padded, (items, the largest size)."""
    counts = torch.tensor(sizes)[:, None]
    return (torch.arange(max(sizes)) < counts).to(device)
