"""Media: what a model reads, and writes, besides text. One folder a medium, one line here.

Everything outside this package speaks of media by name, through the methods of `Medium` and one
argument, `media: Mapping[str, MediaBatch]`. To add a medium, write a folder with a subclass of
`Medium` and register it in `MEDIA` below:

    names            of the medium, its marker in texts, its modules in a model, its files' suffixes
    configuration    `ModelConfig.media[name]`, a section of its own; `enable` gives its defaults
    read, measure    a file or its bytes to a `MediaItem`, within limits
    length, positions, span, groups   how many tokens an item takes, where they stand, who sees whom
    encoder          a module from a `MediaBatch` to vectors of the model's width
    head, losses     an objective of its own on hidden rows, if it has one
    codes, writer    the ids that a model writes it with, and how they become a file, if it can
    inspect, sentences, lines, figures   what people see of it
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from looptx_core.media.base import Grid, Medium, Source, Writer
from looptx_core.media.image import Image

if TYPE_CHECKING:
    from looptx_core.config.model import ModelConfig

__all__ = ["MEDIA", "Grid", "Medium", "Source", "Writer", "media_for", "media_of_file", "writers"]

MEDIA: dict[str, Medium] = {medium.name: medium for medium in (Image(),)}
"""Every known medium by name. The names are the keys of records and of batches."""


def media_for(config: ModelConfig) -> tuple[Medium, ...]:
    """The media that a model of this configuration has, in the registry's order."""
    return tuple(medium for medium in MEDIA.values() if medium.enabled(vars(config)))


def writers(config: ModelConfig) -> dict[str, Writer]:
    """The media that a model of this configuration writes, by name."""
    found = {medium.name: medium.writer(config) for medium in media_for(config)}
    return {name: writer for name, writer in found.items() if writer is not None}


def media_of_file(suffix: str) -> Medium | None:
    """The medium of files with this suffix ('.png'), in any case; None for text."""
    return next((m for m in MEDIA.values() if suffix.lower() in m.suffixes), None)
