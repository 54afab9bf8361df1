"""Pictures to patches: decoded with limits, upright, opaque, in their own proportions.

The size follows Qwen2-VL (arXiv 2409.12191): each side is scaled to a multiple of the patch, both
by nearly the same factor, so that as many patches as fit in the model's number come out.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from looptx_core.config.model import ModelConfig
from looptx_core.documents import open_input
from looptx_core.errors import DataError
from looptx_core.media.base import Source
from looptx_core.media.batch import MediaItem
from looptx_core.media.image.augment import WHITE, changed, draw_change, on_ground

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow may open: its other readers run programs (EPS) or are little tested."""
MOST_PIXELS = 64_000_000
"""Of a picture that is decoded; a small file can claim far more (a decompression bomb)."""
MOST_BYTES = 256 << 20
"""Of a picture's file."""
_LARGE = 16_000_000  # pixels of a picture that is not made smaller before all else
_PNG = b"\x89PNG\r\n\x1a\n"
LEAST_SIDE = 4
_TOO_LARGE = f"the limit is {MOST_PIXELS // 10**6} million in all, so scale it down first"
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_ORIENTATION = 0x0112


def grid_of(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """Rows and columns of a picture's patches: its proportions, at most `most` in all."""
    down = int(min(max(1.0, math.sqrt(most * height / width)), most) + 1e-9)
    ways = [(r, most // r, round(r * width / height)) for r in (down, down + 1) if r <= most]
    fits = [(rows, max(1, min(room, wanted))) for rows, room, wanted in ways]

    def rank(grid: tuple[int, int]) -> tuple[float, int]:
        """Near to the proportions first, then many patches."""
        rows, columns = grid
        return abs(math.log(rows * width / (columns * height))), -rows * columns

    return min(fits, key=rank)


def measure(source: Source, config: ModelConfig, where: str | None = None) -> tuple[int, int]:
    """Rows and columns of a picture's patches, by its header alone. Errors: `read_picture`'s."""
    with opened(source, where) as image:
        return _grid(image, config)


def read_picture(
    source: Source,
    config: ModelConfig,
    where: str | None = None,
    augment: np.random.Generator | None = None,
) -> MediaItem:
    """Decode a picture, a file or its bytes, and cut it into patches.

    Args:
        where: what to call it in errors; absent: its path.
        augment: draws a shift, a scale, a turn, colours and a background, for training.
    Raises:
        DataError: not a picture, truncated, under 4 pixels a side or over 64 million.
    """
    with opened(source, where) as found:
        rows, columns = _grid(found, config)
        image = in_colour(ImageOps.exif_transpose(found), _name(source, where))
    size = (columns * config.patch_size, rows * config.patch_size)
    if augment:
        pixels = changed(image, size, draw_change(augment))
    else:
        flat = on_ground(image, WHITE).resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(flat, np.float32) / 127.5 - 1
    side = config.patch_size
    patches = torch.from_numpy(pixels).view(rows, side, columns, side, 3)
    cut = patches.permute(0, 2, 1, 3, 4).reshape(rows * columns, -1)
    return MediaItem("image", cut, (rows, columns))


def preprocessor(config: ModelConfig) -> dict[str, object]:
    """preprocessor_config.json: what has to be done to a picture, in transformers' terms."""
    return {
        "image_processor_type": "LooptxImageProcessor",
        "do_convert_rgb": True,
        "background": list(WHITE),
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


@contextlib.contextmanager
def opened(
    source: Source,
    where: str | None,
    noun: str = "picture",
    kinds: str = "PNG, JPEG, WebP, GIF, BMP or TIFF",
) -> Iterator[Image.Image]:
    """An opened picture of a bearable size; what goes wrong while it is read is a `DataError`.

    noun, kinds: what it is called in errors, and the files that are read.
    """
    name = _name(source, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            raw = _bytes_of(source)
            if len(raw) > MOST_BYTES:
                raise DataError(f"{name}: over {MOST_BYTES:,} bytes; scale it down first")
            image = Image.open(io.BytesIO(_without_texts(raw)), formats=FORMATS)
        with image:
            check_size(*image.size, name)
            yield image
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such {noun}; check the path") from error
    except (UnidentifiedImageError, IsADirectoryError) as error:
        raise DataError(f"{name}: not a {noun} that can be read; give {kinds}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: far too many pixels; {_TOO_LARGE}") from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, struct.error, IndexError,
            KeyError, TypeError, ZeroDivisionError, OverflowError) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: a damaged {noun} ({reason}); save it again") from error


def moves(file: Path) -> bool:
    """Whether a file has several frames; one that can't be read has not."""
    try:
        with opened(file, None) as image:
            return bool(getattr(image, "is_animated", False))
    except DataError:
        return False


def in_colour(image: Image.Image, name: str) -> Image.Image:
    """A picture in 8 bits a channel, with alpha; a large one is made smaller at once.

    Deeper greys are scaled, which Pillow would cut: 16 bits are 0 to 65535, also in a file whose
    header says 32 of them, and floats are 0 to 1.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image, np.float32)
        low, high = float(grey.min()), float(grey.max())
        top = 1.0 if image.mode == "F" else 65535.0
        vague = image.mode == "I" and image.format != "PNG" and 0 < high < 256
        if not 0 <= low <= high <= top or vague:
            raise DataError(
                f"{name}: grey values from {low:g} to {high:g} in {image.mode}, whose scale is not "
                "known; save it with 8 bits a channel"
            )
        image = Image.fromarray((grey * (255 / top)).round().astype(np.uint8), "L")
    if image.mode in ("P", "PA", "1"):
        image = image.convert("RGBA")
    width, height = image.size
    factor = 1 + math.isqrt((width * height - 1) // _LARGE)
    if factor > 1:  # a picture of the most pixels would take a gigabyte in what follows
        image = image.reduce((min(factor, width), min(factor, height)))
    return image.convert("RGBA")


def _without_texts(raw: bytes) -> bytes:
    """A PNG without its chunks of text, which Pillow would unpack: 1 KB may hold gigabytes."""
    if not raw.startswith(_PNG):
        return raw
    kept, place = [_PNG], len(_PNG)
    while place + 8 <= len(raw):
        end = place + 12 + int.from_bytes(raw[place : place + 4], "big")
        kind = raw[place + 4 : place + 8]
        plain = kind == b"iTXt" and raw[place + 8 :].startswith(b"XML:com.adobe.xmp\0\0")
        if plain or kind not in (b"zTXt", b"tEXt", b"iTXt"):
            kept.append(raw[place:end])
        place = end
    return b"".join(kept)


def _bytes_of(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    with open_input(source) as file:
        return file.read(MOST_BYTES + 1)


def check_size(width: int, height: int, name: str) -> None:
    if width * height > MOST_PIXELS:
        raise DataError(f"{name}: {width}x{height} pixels; {_TOO_LARGE}")
    if min(width, height) < LEAST_SIDE:
        least = f"{LEAST_SIDE}x{LEAST_SIDE}"
        raise DataError(f"{name}: {width}x{height} pixels show nothing; give at least {least}")


def _grid(image: Image.Image, config: ModelConfig) -> tuple[int, int]:
    width, height = image.size
    if image.getexif().get(_ORIENTATION) in _TRANSPOSED:
        width, height = height, width
    return grid_of(height, width, config.patch_size, config.max_patches)


def upright(image: Image.Image, where: str | None) -> Image.Image:
    """An opened picture, turned as its header says, on white."""
    return on_ground(in_colour(ImageOps.exif_transpose(image), where or "the picture"), WHITE)


def opaque(image: Image.Image, size: tuple[int, int], name: str) -> Image.Image:
    """A picture on white, in red, green and blue, at this width and height."""
    return on_ground(in_colour(image, name), WHITE).resize(size, Image.Resampling.BICUBIC)


def _name(source: Source, where: str | None) -> str:
    if where is not None:
        return where
    return "the picture" if isinstance(source, bytes) else str(Path(os.fspath(source)))
