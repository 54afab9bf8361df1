"""A codec: patches of a picture or of a log-mel to codes, and back.

Encoder and detokeniser are trained together, by the detokeniser's loss alone. Codes are found in
float32, so they are the same on one machine with one number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from looptx_core.config.codec import CodecConfig
from looptx_core.media.base import Grid
from looptx_core.media.codec.detokeniser import (
    Detokeniser,
    block_config,
    grid_positions,
    within,
)
from looptx_core.media.codec.quantiser import Quantiser
from looptx_core.media.encoder import Encoder
from looptx_core.model.weights import draw_weights


class PatchEncoder(Encoder):
    """Patches to the numbers that the quantiser makes digits of."""

    patch: nn.Linear

    def __init__(self, config: CodecConfig) -> None:
        patch = nn.Linear(config.values, config.encoder_width)
        blocks = block_config(config)
        super().__init__(blocks, config.encoder_layers, config.encoder_width, patch=patch)
        self.window = config.window
        self.digits = nn.Linear(config.encoder_width, len(config.levels))

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        """patches (batch, patches, numbers) -> (batch, patches, digits), any numbers."""
        there = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        near = within(self.window, grid, patches.device)
        x = self.run(self.patch(patches), grid_positions(grid, patches.device), there, near)
        return self.digits(x)


class Codec(nn.Module):
    """Encoder, quantiser and detokeniser."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = PatchEncoder(config)
        self.quantiser = Quantiser(config.levels)
        self.detokeniser = Detokeniser(config)
        depth = block_config(config).effective_layers((1 + config.max_loops) // 2)
        draw_weights(((n, p) for n, p in self.named_parameters() if is_block(n)), depth)

    def values(self, patches: Tensor, grid: Grid) -> Tensor:
        """The codes' values, (batch, patches, digits), with a gradient for the encoder."""
        return self.quantiser(self.encoder(patches, grid))

    @torch.no_grad()
    def encode(self, patches: Tensor, grid: Grid) -> Tensor:
        """patches (batch, patches, numbers), -1 to 1 -> codes (batch, patches)."""
        weight = self.encoder.patch.weight
        found = self.values(patches.to(weight.device, weight.dtype), grid)
        return self.quantiser.codes(found)

    @torch.no_grad()
    def decode(
        self,
        codes: Tensor,
        grid: Grid,
        *,
        steps: int = 8,
        guidance: float = 1.0,
        loops: int | None = None,
        seed: int = 0,
    ) -> Tensor:
        """codes (batch, patches) -> patches, -1 to 1; see `Detokeniser.sample`."""
        values = self.quantiser.values(codes.to(self.encoder.patch.weight.device))
        return self.detokeniser.sample(
            values, grid, steps=steps, guidance=guidance, loops=loops, seed=seed
        )

    @property
    def grid(self) -> Grid:
        """Rows and columns of a picture's patches, or of a stretch of speech."""
        return self.config.rows, self.config.columns


def is_block(name: str) -> bool:
    """Whether a parameter, by its name in a codec, belongs to a block."""
    return any(part in name for part in (".blocks.", ".prelude.", ".core.", ".coda."))
