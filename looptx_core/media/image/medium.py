"""The medium of images: what the rest of the package asks of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looptx_core.media.base import FolderMedium, Grid, MediumLosses, Source
from looptx_core.media.writer import Writer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from looptx_core.config.model import ModelConfig
    from looptx_core.media.batch import MediaBatch, MediaItem

DEFAULT_LAYERS = 4
"""Blocks of the encoder that a model gets when its data has images and nothing else is said."""


class Image(FolderMedium):
    """Images, upright and in their own proportions, as patches in one group of attention."""

    name, noun, plural = "image", "picture", "pictures"
    marker, ability = "<|image|>", "vision"
    write_key, write_ability = "draw", "drawing"
    part = "image_url"
    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
    grid_names = ("rows", "columns")
    axes = 2
    encoder_name, head_name = "vision", "patch_head"
    size_key = "model.vision_layers"

    def enabled(self, settings: Mapping[str, Any]) -> bool:
        return settings.get("vision_layers", 0) > 0

    def enable(self, config: ModelConfig) -> ModelConfig:
        return replace(config, vision_layers=DEFAULT_LAYERS)

    def enable_head(self, config: ModelConfig) -> ModelConfig:
        return replace(config, reconstruct=True)

    def token(self, config: ModelConfig) -> int:
        return config.image_token

    def describe(self, config: ModelConfig) -> str:
        return f"an encoder of {config.vision_layers} blocks"

    def files(self, config: ModelConfig) -> dict[str, Any]:
        return {"preprocessor_config.json": self.module("read").preprocessor(config)}

    def claims(self, file: Path) -> bool:
        return super().claims(file) and not self.moves(file)

    def moves(self, file: Path) -> bool:
        """Whether a WebP or GIF has several frames, and so is a clip."""
        return file.suffix.lower() in (".webp", ".gif") and self.module("read").moves(file)

    def measure(self, source: Source, config: ModelConfig, where: str | None = None) -> Grid:
        return self.module("read").measure(source, config, where)

    def read(
        self,
        source: Source,
        config: ModelConfig,
        where: str | None = None,
        augment: Any = None,
    ) -> MediaItem:
        return self.module("read").read_picture(source, config, where, augment)

    def positions(self, grid: Grid) -> Tensor:
        """Row and column."""
        import torch

        return torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 2).T

    def span(self, grid: Grid) -> int:
        """The text goes on at the largest position plus one (M-RoPE, arXiv 2409.12191)."""
        return max(grid)

    def groups(self, grid: Grid, config: ModelConfig) -> Tensor | None:
        import torch

        if config.image_attention == "causal":
            return None
        return torch.zeros(self.length(grid), dtype=torch.long)

    def encoder(self, config: ModelConfig) -> nn.Module:
        from looptx_core.media.image.encoder import VisionEncoder

        return VisionEncoder(config)

    def layers(self, config: ModelConfig) -> int:
        return config.vision_layers

    def head(self, config: ModelConfig) -> nn.Module | None:
        from looptx_core.media.image.masked import PatchHead

        return PatchHead(config) if config.reconstruct else None

    def flops(self, config: ModelConfig) -> int:
        """Of one patch beside `max_patches` others."""
        width = config.vision_width
        block = 2 * (4 * width**2 + 9 * width**2 + 2 * config.max_patches * width)
        ends = 2 * width * (3 * config.patch_size**2 + config.d_model)
        return config.vision_layers * block + ends

    def losses(
        self, head: nn.Module, states: Tensor, numbers: Tensor, batch: MediaBatch
    ) -> MediumLosses:
        from looptx_core.media.image.masked import reconstruct, reconstruction_losses

        return reconstruction_losses(reconstruct(head, states, numbers, batch))

    def writes(self, settings: Mapping[str, Any]) -> bool:
        draw = settings.get("draw") or {}
        return bool(draw.get("codec") if isinstance(draw, Mapping) else draw.codec)

    def codes(self, config: ModelConfig) -> int:
        return config.draw.codes

    def with_codes(self, config: ModelConfig, first: int) -> ModelConfig:
        size = max(config.vocab_size, first + config.draw.codes)
        return replace(config, vocab_size=size, draw=replace(config.draw, first_code=first))

    def writer(self, config: ModelConfig) -> Writer | None:
        return self.module("draw").Drawing(config.draw) if config.draw.codec else None
