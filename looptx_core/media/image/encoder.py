"""The encoder of images: each patch becomes a vector of the decoder's width.

It is made of blocks of the decoder's own kind, with RoPE by row and column and no causal mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from looptx_core.config.model import ModelConfig
from looptx_core.media.batch import MediaBatch
from looptx_core.media.encoder import Encoder, present


class VisionEncoder(Encoder):
    """Patches to vectors of the decoder's width; all of one picture see each other.

    A clip is read tubelet by tubelet; what happens from one to the next is for the decoder.
    """

    patch: nn.Linear

    def __init__(self, config: ModelConfig) -> None:
        patch = nn.Linear(3 * config.patch_size**2, config.vision_width)
        super().__init__(config, config.vision_layers, config.vision_width, patch=patch)
        # What stands for a hidden patch.
        self.unknown = (
            nn.Parameter(torch.zeros(config.vision_width)) if config.reconstruct else None
        )
        self.project = nn.Linear(config.vision_width, config.d_model, bias=False)
        # Of what the second frame of a tubelet adds to the first; a still clip is a picture.
        self.later = (
            nn.Linear(3 * config.patch_size**2, config.vision_width, bias=False)
            if config.video.frames
            else None
        )

    def reset_stem(self) -> None:
        if self.later is not None:
            nn.init.zeros_(self.later.weight)

    def forward(self, images: MediaBatch) -> Tensor:
        """-> (patches of all images, the decoder's d_model)."""
        grids = images.grids.tolist()
        clips = images.grids.shape[1] == 4
        if clips:  # each step of time is read by itself, as a picture
            grids = [(rows, columns) for steps, rows, columns, _ in grids for _ in range(steps)]
        sizes = [rows * columns for rows, columns in grids]
        weight = self.patch.weight
        places = [torch.cartesian_prod(torch.arange(r), torch.arange(c)) for r, c in grids]
        x = pad_sequence(images.features.to(weight.dtype).split(sizes), batch_first=True)
        positions = pad_sequence([p.view(-1, 2) for p in places], batch_first=True)
        there = present(sizes, weight.device)
        if clips:
            assert self.later is not None, "the configuration has no clips"
            first, second = x.chunk(2, -1)
            x = self.patch(first) + self.later(second - first)
        else:
            x = self.patch(x)
        if images.hidden is not None and self.unknown is not None:
            hidden = pad_sequence(images.hidden.split(sizes), batch_first=True)
            x = torch.where(hidden[..., None], self.unknown.to(x.dtype), x)
        x = self.run(x, positions.permute(2, 0, 1).to(weight.device), there)
        return self.project(x)[there]
