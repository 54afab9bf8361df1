"""Pictures as a codec sees them: of one size, whole, on white."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from looptx_core.config.codec import CodecConfig
from looptx_core.media.base import Source
from looptx_core.media.image.read import WHITE, opened, upright


def read_patches(source: Source, config: CodecConfig, where: str | None = None) -> Tensor:
    """A picture as patches of bytes, (patches, numbers), with white at its shorter sides.

    Raises `DataError` for what can't be read.
    """
    side = config.side
    size = (config.columns * side, config.rows * side)
    with opened(source, where) as image:
        flat = upright(image, where)
        fitted = ImageOps.pad(flat, size, Image.Resampling.BICUBIC, color=WHITE)
    pixels = torch.from_numpy(np.asarray(fitted).copy())
    cut = pixels.view(config.rows, side, config.columns, side, 3).permute(0, 2, 1, 3, 4)
    return cut.reshape(config.rows * config.columns, -1)


def training_items(source: Source, config: CodecConfig, where: str | None = None) -> Tensor:
    """What a codec learns of a picture, (1, patches, numbers) of bytes.

    Raises the errors of `read_patches`.
    """
    return read_patches(source, config, where)[None]


def to_picture(patches: Tensor, config: CodecConfig) -> Image.Image:
    """The inverse, of patches (patches, numbers) from -1 to 1."""
    side = config.side
    pixels = ((patches.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    whole = pixels.view(config.rows, config.columns, side, side, 3).permute(0, 2, 1, 3, 4)
    shape = (config.rows * side, config.columns * side, 3)
    return Image.fromarray(whole.reshape(shape).numpy(), "RGB")


def to_file(picture: Image.Image, kind: str = "PNG") -> bytes:
    """The content of a file of this kind, as Pillow names it."""
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()
