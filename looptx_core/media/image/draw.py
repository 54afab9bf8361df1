"""Pictures that a model draws: as many codes as its codec's grid has, then a file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from looptx_core.config.generation import GenerationOptions
from looptx_core.config.media import DrawConfig
from looptx_core.media.base import Source
from looptx_core.media.codec.codec import Codec
from looptx_core.media.codec.opened import opened_codec
from looptx_core.media.image.coded import read_patches, to_file, to_picture
from looptx_core.media.writer import Writer


class Drawing(Writer):
    """Codes from the upper left corner to the lower right one, row by row."""

    def __init__(self, config: DrawConfig) -> None:
        self.config = config
        self.opens, self.first_code, self.codes = config.token, config.first_code, config.codes
        self.length = config.rows * config.columns

    @property
    def codec(self) -> Codec:
        return opened_codec(self.config.codec).codec

    def finished(self, written: Sequence[int], transcript: Sequence[int] = ()) -> bool:
        return len(written) == self.length

    def encode(
        self, source: Source, where: str | None = None, transcript: Sequence[tuple[int, bytes]] = ()
    ) -> list[int]:
        codec = self.codec
        patches = read_patches(source, codec.config, where)
        codes = codec.encode(patches[None].float() / 127.5 - 1, codec.grid)
        return (codes[0] + self.first_code).tolist()

    def render(self, written: Sequence[int], options: GenerationOptions) -> bytes:
        codec = self.codec
        patches = codec.decode(
            torch.tensor([written]) - self.first_code,
            codec.grid,
            steps=options.draw_steps,
            guidance=options.draw_guidance,
            seed=options.seed,
        )
        return to_file(to_picture(patches[0], codec.config))

    def grid(self, written: Sequence[int]) -> tuple[int, int]:
        return self.config.rows, self.config.columns

    def shown(self, content: bytes) -> list[list[Any]]:
        with Image.open(io.BytesIO(content)) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        return (pixels / 255).round(3).tolist()
