"""The encoder of images: each patch becomes a vector of the decoder's width.

It is made of blocks of the decoder's own kind, with RoPE by row and column and no causal mask.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from looptx_core.config.model import ModelConfig
from looptx_core.media.batch import MediaBatch
from looptx_core.model.block import Block, ForwardContext
from looptx_core.model.norm import RMSNorm
from looptx_core.model.rope import rotary_tables


class VisionEncoder(nn.Module):
    """Patches to vectors of the decoder's width; all of one picture see each other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads = config.vision_width // config.head_dim
        # Its weights stay floats where the decoder's are ternary: it runs once, not per token.
        own = replace(
            config,
            d_model=config.vision_width,
            n_heads=heads,
            n_kv_heads=heads,
            d_ff=3 * config.vision_width,
            linear="float",
        )
        self.config = own
        self.patch = nn.Linear(3 * config.patch_size**2, own.d_model)
        # What stands for a hidden patch.
        self.unknown = nn.Parameter(torch.zeros(own.d_model)) if config.reconstruct else None
        self.blocks = nn.ModuleList(Block(own) for _ in range(config.vision_layers))
        self.norm = RMSNorm(own.d_model, own.norm_eps)
        self.project = nn.Linear(own.d_model, config.d_model, bias=False)

    def forward(self, images: MediaBatch) -> Tensor:
        """-> (patches of all images, the decoder's d_model)."""
        grids = images.grids.tolist()
        sizes = [rows * columns for rows, columns in grids]
        weight = self.patch.weight
        places = [torch.cartesian_prod(torch.arange(r), torch.arange(c)) for r, c in grids]
        x = pad_sequence(images.features.to(weight.dtype).split(sizes), batch_first=True)
        positions = pad_sequence([p.view(-1, 2) for p in places], batch_first=True)
        counts = torch.tensor(sizes)[:, None]
        there = (torch.arange(x.shape[1]) < counts).to(weight.device)
        rotary = rotary_tables(
            positions.permute(2, 0, 1).to(weight.device),
            self.config.head_dim,
            self.config.rope_theta,
            weight.dtype,
        )
        # A mask even where nothing is padded: without one attention would be causal.
        ctx = ForwardContext(rotary, there[:, None, None, :].expand(-1, 1, x.shape[1], -1))
        x = self.patch(x)
        if images.hidden is not None and self.unknown is not None:
            hidden = pad_sequence(images.hidden.split(sizes), batch_first=True)
            x = torch.where(hidden[..., None], self.unknown.to(x.dtype), x)
        for block in self.blocks:
            x = block(x, ctx)
        return self.project(self.norm(x))[there]
