"""The medium of clips: what the rest of the package asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looptx_core.media.base import FolderMedium, Grid, Source
from looptx_core.media.image.medium import Image

if TYPE_CHECKING:
    from torch import Tensor

    from looptx_core.config.model import ModelConfig
    from looptx_core.media.batch import MediaItem

DEFAULT_FRAMES = 16
"""Frames of a clip that a model sees when its data has clips and nothing else is said."""


class Video(FolderMedium):
    """Clips as tubelets of two frames, each read as a picture, one after another in time.

    A tubelet's patches stand like a picture's at the moment when it is shown, time being a third
    axis (the diagonal layout of VideoRoPE, arXiv 2502.05173). They see each other and all that
    came before, so that a clip may come in pieces: no state depends on later frames.
    """

    name, noun, plural = "video", "clip", "clips"
    marker, ability = "<|video|>", "watching"
    part = "video_url"
    suffixes = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".apng")
    grid_names = ("steps", "rows", "columns", "positions")
    axes = 3
    encoder_name = "vision"
    size_key = "model.video.frames"

    def enabled(self, settings: Mapping[str, Any]) -> bool:
        section = settings.get("video") or {}
        frames = section.get("frames", 0) if isinstance(section, Mapping) else section.frames
        return frames > 0

    def enable(self, config: ModelConfig) -> ModelConfig:
        config = config if config.vision_layers else Image().enable(config)
        return replace(config, video=replace(config.video, frames=DEFAULT_FRAMES))

    def claims(self, file: Path) -> bool:
        return super().claims(file) or Image().moves(file)

    def section(self, config: ModelConfig) -> Mapping[str, Any]:
        return vars(config.video)

    def token(self, config: ModelConfig) -> int:
        return config.video.token

    def describe(self, config: ModelConfig) -> str:
        return f"up to {config.video.frames} frames, by the encoder of pictures"

    def measure(self, source: Source, config: ModelConfig, where: str | None = None) -> Grid:
        return self.module("read").measure_clip(source, config, where)

    def read(
        self,
        source: Source,
        config: ModelConfig,
        where: str | None = None,
        augment: Any = None,
    ) -> MediaItem:
        return self.module("read").read_clip(source, config, where, augment)

    def length(self, grid: Grid) -> int:
        steps, rows, columns, _ = grid
        return steps * rows * columns

    def positions(self, grid: Grid) -> Tensor:
        """Time, and time plus row and column: so what stands where depends on no later frame."""
        import torch

        steps, rows, columns, positions = grid
        ranges = torch.arange(steps) * positions, torch.arange(rows), torch.arange(columns)
        time, row, column = torch.cartesian_prod(*ranges).view(-1, 3).T
        return torch.stack([time, time + row, time + column])

    def span(self, grid: Grid) -> int:
        return grid[0] * grid[3]

    def groups(self, grid: Grid, config: ModelConfig) -> Tensor | None:
        import torch

        return torch.arange(grid[0]).repeat_interleave(grid[1] * grid[2])

    def flops(self, config: ModelConfig) -> int:
        """Of one place of two patches, beside those of its frame."""
        return Image().flops(config) + 2 * config.vision_width * 3 * config.patch_size**2
