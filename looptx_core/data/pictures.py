"""Pictures to patches: decoded with limits, upright, opaque, in their own proportions.

The size follows Qwen2-VL (arXiv 2409.12191): each side is scaled to a multiple of the patch, both
by nearly the same factor, so that as many patches as fit in the model's number come out.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError
from torch import Tensor

from looptx_core.config.model import ModelConfig
from looptx_core.errors import DataError, UsageError
from looptx_core.model.vision import Pictures

MOST_PIXELS = 64_000_000
"""Of a picture that is decoded; a small file can claim far more (a decompression bomb)."""
LEAST_SIDE = 4
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_ORIENTATION = 0x0112

Source = str | os.PathLike[str] | bytes


class Picture(NamedTuple):
    """One picture. patches: (rows * columns, 3 * patch_size ** 2), -1 to 1, row by row."""

    patches: Tensor
    rows: int
    columns: int


def grid_of(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """Rows and columns of a picture's patches: its proportions, at most `most` in all."""
    rows = min(max(1.0, math.sqrt(most * height / width)), most)
    down = int(rows + 1e-9)
    candidates = [(r, min(most // r, max(1, round(r * width / height)))) for r in (down, down + 1)]
    # Near to the proportions first, then many patches.
    fits = [(r, c) for r, c in candidates if r * c <= most]
    return min(fits, key=lambda g: (abs(math.log(g[0] * width / (g[1] * height))), -g[0] * g[1]))


def measure(source: Source, config: ModelConfig, where: str | None = None) -> tuple[int, int]:
    """Rows and columns of a picture's patches, by its header alone. Errors: `read_picture`'s."""
    with _opened(source, where) as image:
        return _grid(image, config)


def read_picture(
    source: Source,
    config: ModelConfig,
    where: str | None = None,
    augment: np.random.Generator | None = None,
) -> Picture:
    """Decode a picture, a file or its bytes, and cut it into patches.

    Args:
        where: what to call it in errors; absent: its path.
        augment: draws a shift, a scale, colours and a background, for training.
    Raises:
        DataError: not a picture, truncated, under 4 pixels a side or over 64 million.
    """
    with _opened(source, where) as image:
        rows, columns = _grid(image, config)
        try:
            image = ImageOps.exif_transpose(image).convert("RGBA")
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise DataError(
                f"{_name(source, where)}: a damaged picture ({_reason(error)}); save it again"
            ) from error
    size = (columns * config.patch_size, rows * config.patch_size)
    flat = _augmented(image, size, augment) if augment else _flat(image, (255, 255, 255))
    pixels = np.asarray(flat.resize(size, Image.Resampling.BICUBIC), np.float32)
    side = config.patch_size
    patches = torch.from_numpy(pixels / 127.5 - 1).view(rows, side, columns, side, 3)
    return Picture(patches.permute(0, 2, 1, 3, 4).reshape(rows * columns, -1), rows, columns)


def together(pictures: list[Picture]) -> Pictures | None:
    """The pictures of a batch; None for none."""
    if not pictures:
        return None
    grids = torch.tensor([[p.rows, p.columns] for p in pictures])
    return Pictures(torch.cat([p.patches for p in pictures]), grids)


def preprocessor(config: ModelConfig) -> dict[str, object]:
    """preprocessor_config.json: what has to be done to a picture, in transformers' terms."""
    return {
        "image_processor_type": "LooptxImageProcessor",
        "do_convert_rgb": True,
        "background": [255, 255, 255],
        "do_resize": True,
        "resample": int(Image.Resampling.BICUBIC),
        "patch_size": config.patch_size,
        "max_patches": config.max_patches,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _opened(source: Source, where: str | None) -> Image.Image:
    name = _name(source, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such picture; check the path") from error
    except (UnidentifiedImageError, IsADirectoryError, SyntaxError) as error:
        raise DataError(
            f"{name}: not a picture that can be read; give PNG, JPEG, WebP, GIF or BMP"
        ) from error
    except (Image.DecompressionBombError, OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be read ({_reason(error)}); check the file") from error
    width, height = image.size
    if width * height > MOST_PIXELS:
        image.close()
        raise DataError(
            f"{name}: {width}x{height} pixels, over the limit of {MOST_PIXELS // 10**6} million; "
            "scale it down first"
        )
    if min(width, height) < LEAST_SIDE:
        image.close()
        raise DataError(
            f"{name}: {width}x{height} pixels show nothing; give at least {LEAST_SIDE}x{LEAST_SIDE}"
        )
    return image


def _grid(image: Image.Image, config: ModelConfig) -> tuple[int, int]:
    width, height = image.size
    if image.getexif().get(_ORIENTATION) in _TRANSPOSED:
        width, height = height, width
    return grid_of(height, width, config.patch_size, config.max_patches)


def _flat(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    under = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(under, image).convert("RGB")


def _augmented(image: Image.Image, size: tuple[int, int], draw: np.random.Generator) -> Image.Image:
    """Shifted, scaled and turned a little, in other colours, of the wanted size."""
    background = (255, 255, 255)
    if draw.random() < 0.3:
        red, green, blue = draw.integers(160, 256, 3).tolist()
        background = (red, green, blue)
    flat = _flat(image, background)
    flat = flat.rotate(draw.uniform(-12, 12), Image.Resampling.BILINEAR, fillcolor=background)
    width, height = flat.size
    scale = np.exp(draw.uniform(-0.2, 0.2)) / np.exp(draw.uniform(-0.08, 0.08, 2))
    (dx, dy), (sx, sy) = draw.uniform(-0.08, 0.08, 2) * (width, height), scale
    flat = flat.transform(
        size,
        Image.Transform.AFFINE,
        (
            sx * width / size[0], 0, (1 - sx) * width / 2 + dx,
            0, sy * height / size[1], (1 - sy) * height / 2 + dy,
        ),
        Image.Resampling.BICUBIC,
        fillcolor=background,
    )  # fmt: skip
    for change in (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness):
        flat = change(flat).enhance(draw.uniform(0.7, 1.3))
    if draw.random() < 0.1:
        flat = ImageOps.grayscale(flat).convert("RGB")
    return flat


def _name(source: Source, where: str | None) -> str:
    if where is not None:
        return where
    return "the picture" if isinstance(source, bytes) else str(Path(os.fspath(source)))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_markers(count: int, pictures: int, marker: str) -> None:
    """Raise `UsageError` unless each picture has its marker in the prompt."""
    if count != pictures:
        raise UsageError(
            f"the prompt has {count} {marker} for {pictures} --image; write it once a picture, or "
            "leave all out and the pictures come first"
        )
