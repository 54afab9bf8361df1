"""Changes of a picture for training, drawn at random: place, scale, turn, ground and colours."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

WHITE = (255, 255, 255)
"""What lies under a transparent picture."""


class Change(NamedTuple):
    """One change. A clip has the same for all of its frames."""

    background: tuple[int, int, int]
    """What lies under transparent parts and beside the picture."""
    angle: float
    """Radians."""
    shift: np.ndarray
    """(2,), shares of width and height."""
    scale: np.ndarray
    """(2,), what width and height are multiplied by; above 1 the picture becomes smaller."""
    saturation: float
    contrast: np.ndarray
    """(3,), of each colour."""
    brightness: float


def draw_change(rng: np.random.Generator) -> Change:
    """Nothing is mirrored, as left and right may be what a text is about."""
    background = WHITE
    if rng.random() < 0.4:
        red, green, blue = rng.integers(0, 256, 3).tolist()
        background = (red, green, blue)
    angle, shift = float(np.deg2rad(rng.uniform(-15, 15))), rng.uniform(-0.1, 0.1, 2)
    scale = np.exp(rng.uniform(-0.25, 0.25) + rng.uniform(-0.08, 0.08, 2))
    saturation = 0.0 if rng.random() < 0.1 else rng.uniform(0.5, 1.5)
    contrast = rng.uniform(0.7, 1.3) * np.exp(rng.uniform(-0.15, 0.15, 3))
    return Change(background, angle, shift, scale, saturation, contrast, rng.uniform(-0.15, 0.15))


def changed(image: Image.Image, size: tuple[int, int], change: Change) -> np.ndarray:
    """A changed picture, (height, width, 3) from -1 to 1. image: RGBA. size: width and height."""
    # What follows looks at single pixels, so a large picture is scaled down first.
    image = image.resize(
        [min(side, 2 * wanted) for side, wanted in zip(image.size, size)],
        Image.Resampling.BOX,
    )
    flat = on_ground(image, change.background)
    cos, sin = np.cos(change.angle), np.sin(change.angle)
    # Columns: where a step to the right and a step down lead, in the picture's own pixels.
    turn = np.array([[cos, -sin], [sin, cos]]) * change.scale
    step = turn / np.array(size) * np.array(flat.size)[:, None]
    corner = (0.5 + change.shift) * flat.size - step @ np.array(size) / 2
    flat = flat.transform(
        size,
        Image.Transform.AFFINE,
        (*step[0], corner[0], *step[1], corner[1]),
        Image.Resampling.BICUBIC,
        fillcolor=change.background,
    )
    pixels = np.asarray(flat, np.float32) / 127.5 - 1
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    pixels = grey[..., None] + np.float32(change.saturation) * (pixels - grey[..., None])
    found = pixels * change.contrast.astype(np.float32) + np.float32(change.brightness)
    return np.clip(found, -1, 1)


def on_ground(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """An RGBA picture on a colour, in red, green and blue."""
    under = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(under, image).convert("RGB")
