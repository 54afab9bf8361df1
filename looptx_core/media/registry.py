"""The media that there are, by name: one line each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from looptx_core.media.audio.medium import Audio
from looptx_core.media.base import Medium
from looptx_core.media.image.medium import Image
from looptx_core.media.video.medium import Video
from looptx_core.media.writer import Writer

if TYPE_CHECKING:
    from looptx_core.config.model import ModelConfig

MEDIA: dict[str, Medium] = {medium.name: medium for medium in (Image(), Audio(), Video())}
"""Every known medium by name. The names are the keys of records and of batches."""


def media_for(config: ModelConfig) -> tuple[Medium, ...]:
    """The media that a model of this configuration has, in the registry's order."""
    return tuple(medium for medium in MEDIA.values() if medium.enabled(vars(config)))


def writers(config: ModelConfig) -> dict[str, Writer]:
    """The media that a model of this configuration writes, by name."""
    found = {medium.name: medium.writer(config) for medium in media_for(config)}
    return {name: writer for name, writer in found.items() if writer is not None}


def media_of_file(file: Path) -> Medium | None:
    """The medium of a file that exists, by its suffix; a WebP or GIF that moves is a clip."""
    return next((medium for medium in MEDIA.values() if medium.claims(file)), None)
