"""Pictures on a transparent ground, redrawn in styles that nobody drew.

A model that sees a cat in a dozen styles learns a dozen drawings. What styles differ in is drawn
here at random: the way of shading, the outline, hue and contrast, texture, ground, proportions,
turn and scale. A name that speaks of a colour or of a side keeps its colours or its sides.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

COLOURS = re.compile(
    r"\b(red|orange|yellow|green|blue|purple|brown|black|white|pink|gr[ae]y|golden?|silver|"
    r"light|dark|rainbow|fl?ag|apple|moon|skin)\b"
)
SIDED_KINDS = ("flag", "arrow", "alphanum", "keycap", "symbol", "time", "math", "geometric",
               "currency", "punctuation", "zodiac", "religion", "gender", "sign", "hand",
               "body parts", "game", "writing", "office")  # fmt: skip


class Kept(NamedTuple):
    """What must stay as it is for a picture's name to stay true."""

    colours: bool
    sides: bool


def kept_of(name: str, kind: str) -> Kept:
    sided = any(word in kind for word in SIDED_KINDS) or re.search(r"\b(left|right)", name)
    return Kept(bool(COLOURS.search(name) or "flag" in kind), bool(sided))


def restyle(picture: Image.Image, kept: Kept, rng: np.random.Generator, side: int) -> Image.Image:
    """Another drawing of a picture, RGBA, side x side pixels."""
    box = picture.getchannel("A").getbbox() or (0, 0, *picture.size)
    found = _warped(picture.crop(box), kept, rng, side)
    ways = (_as_it_is, _flat, _line_drawing, _glyph, _lit)
    found = ways[rng.choice(len(ways), p=(0.3, 0.25, 0.15, 0.1, 0.2))](found, rng)
    found = _other_colours(found, kept, rng)
    if rng.random() < 0.5:
        found = _outlined(found, rng)
    if rng.random() < 0.25:
        found = _textured(found, rng)
    if rng.random() < 0.2:
        small = int(rng.integers(side // 3, side))
        found = found.resize((small, small), Image.Resampling.BOX).resize(found.size)
    if rng.random() < 0.3:
        found = Image.alpha_composite(_ground(rng, side), found)
    return found


def _warped(picture: Image.Image, kept: Kept, rng: np.random.Generator, side: int) -> Image.Image:
    """Turned, scaled, sheared, bent a little, and seen from the other side half of the time."""
    angle = np.deg2rad(np.clip(rng.normal(0, 12), -30, 30))
    scale = np.exp(rng.uniform(-0.1, 0.35) + rng.uniform(-0.12, 0.12, 2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn = turn @ np.array([[1, rng.normal(0, 0.08)], [rng.normal(0, 0.08), 1]]) * scale
    if not kept.sides and rng.random() < 0.5:
        turn[0] *= -1
    # A unit of both axes is the longer side of the picture, so that its proportions stay.
    line = np.linspace(-0.5, 0.5, side)
    rows, columns = np.meshgrid(line, line, indexing="ij")
    x, y = np.einsum("ij,jrc->irc", turn, np.stack([columns, rows]))
    bends = rng.normal(0, rng.uniform(0, 0.03), (2, 4, 4)).astype(np.float32)
    x, y = (
        place + np.asarray(Image.fromarray(bend).resize((side, side), Image.Resampling.BICUBIC))
        for place, bend in zip((x, y), bends)
    )
    shift = rng.uniform(-0.06, 0.06, 2)
    width, height = picture.size
    longer = max(width, height)
    pixels = _premultiplied(picture)
    return _from_premultiplied(
        _sampled(pixels, (y + shift[1]) * longer + height / 2, (x + shift[0]) * longer + width / 2)
    )


def _sampled(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear, nothing outside. pixels: (height, width, channels)."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)))
    height, width = padded.shape[:2]
    rows = np.clip(rows + 0.5, 0, height - 1.001)
    columns = np.clip(columns + 0.5, 0, width - 1.001)
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    upper = padded[top, left] * (1 - right) + padded[top, left + 1] * right
    lower = padded[top + 1, left] * (1 - right) + padded[top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


def _premultiplied(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture, np.float32) / 255
    return np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], -1)


def _from_premultiplied(pixels: np.ndarray) -> Image.Image:
    alpha = pixels[..., 3:]
    colours = np.where(alpha > 1e-3, pixels[..., :3] / np.maximum(alpha, 1e-3), 1)
    return _picture(colours, alpha)


def _picture(colours: np.ndarray, alpha: np.ndarray) -> Image.Image:
    """colours: (height, width, 3), alpha: (height, width, 1), both 0 to 1."""
    pixels = np.concatenate([np.broadcast_to(colours, (*alpha.shape[:2], 3)), alpha], -1)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8), "RGBA")


def _parts(picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.asarray(picture, np.float32) / 255
    return pixels[..., :3], pixels[..., 3:]


def _as_it_is(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture


def _flat(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Areas of few colours, without shading."""
    calm = picture.convert("RGB").filter(ImageFilter.MedianFilter(3))
    if rng.random() < 0.5:
        calm = calm.filter(ImageFilter.ModeFilter(5))
    flat = calm.quantize(int(rng.integers(3, 8)), Image.Quantize.MEDIANCUT).convert("RGBA")
    flat.putalpha(picture.getchannel("A"))
    return flat


def _edges(picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """How much of a line goes through each pixel, (height, width, 1), 0 to 1."""
    colours, alpha = _parts(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.0))))
    seen = colours * alpha + (1 - alpha)
    down, right = np.gradient(seen, axis=(0, 1))
    steep = np.sqrt((down**2 + right**2).sum(-1, keepdims=True))
    least = rng.uniform(0.05, 0.15)
    return ((steep - least) / 0.1).clip(0, 1)


def _line_drawing(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Dark lines where colours change, on paper or on nothing."""
    lines = _edges(picture, rng)
    _, alpha = _parts(picture)
    ink, paper = rng.uniform(0, 0.35, 3), rng.uniform(0.85, 1, 3)
    if rng.random() < 0.3:
        ink, paper = paper, ink
    under = alpha * (rng.random() < 0.7)
    return _picture(lines * ink + (1 - lines) * paper, np.maximum(lines, under))


def _glyph(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One ink: dark areas and lines, the rest empty."""
    colours, alpha = _parts(picture)
    grey = colours.mean(-1, keepdims=True)
    inside = grey[alpha > 0.5] if (alpha > 0.5).any() else grey
    dark = ((np.median(inside) - grey) / 0.1 + 0.5).clip(0, 1) * alpha
    marks = np.maximum(dark, _edges(picture, rng) * (rng.random() < 0.7))
    if rng.random() < 0.3:
        marks = (alpha - marks).clip(0, 1)
    return _picture(rng.uniform(0, 0.4, 3), marks)


def _lit(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Rounded by a light from somewhere, with a gleam."""
    colours, alpha = _parts(picture)
    soft = picture.getchannel("A").filter(ImageFilter.GaussianBlur(rng.uniform(3, 8)))
    height = np.asarray(soft, np.float32) / 255
    down, right = np.gradient(height)
    angle = rng.uniform(0, 2 * np.pi)
    light = (np.sin(angle) * down + np.cos(angle) * right)[..., None]
    light = light / max(np.abs(light).max(), 1e-6) * rng.uniform(0.1, 0.4)
    gleam = np.maximum(light - 0.15, 0) * 2 * (rng.random() < 0.5)
    return _picture(colours * (1 + light) + gleam, alpha)


def _other_colours(picture: Image.Image, kept: Kept, rng: np.random.Generator) -> Image.Image:
    hue, saturation, value = (
        np.asarray(band, np.float32) for band in picture.convert("RGB").convert("HSV").split()
    )
    if not kept.colours:
        turn = rng.uniform(-128, 128) if rng.random() < 0.1 else rng.normal(0, 8)
        hue = (hue + turn) % 256
        if rng.random() < 0.08:
            saturation = saturation * 0
    saturation = (saturation * np.exp(rng.normal(0, 0.3))).clip(0, 255)
    value = 255 * (value / 255) ** np.exp(rng.normal(0, 0.3))
    changed = np.stack([hue, saturation, value], -1).round().astype(np.uint8)
    found = Image.fromarray(changed, "HSV").convert("RGBA")
    found.putalpha(picture.getchannel("A"))
    return found


def _outlined(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A line around it, and often along its edges inside."""
    colours, alpha = _parts(picture)
    width = int(rng.integers(1, 4))
    wide = picture.getchannel("A").filter(ImageFilter.MaxFilter(2 * width + 1))
    thin = picture.getchannel("A").filter(ImageFilter.MinFilter(3))
    wide = wide.filter(ImageFilter.GaussianBlur(0.5))
    ink = rng.uniform(0, 0.25) * np.ones(3)
    if (kind := rng.random()) < 0.2:
        ink = np.ones(3)
    elif kind < 0.4:
        ink = colours[alpha[..., 0] > 0.5].mean(0) * 0.5 if (alpha > 0.5).any() else ink
    core = np.asarray(thin, np.float32)[..., None] / 255
    if rng.random() < 0.6:
        core = core * (1 - _edges(picture, rng))
    around = np.maximum(np.asarray(wide, np.float32)[..., None] / 255, alpha)
    return _picture(colours * core + ink * (1 - core), around)


def _textured(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    colours, alpha = _parts(picture)
    cells = int(rng.choice([8, 16, 32, 64]))
    return _picture(colours + _noise(rng, alpha.shape[0], cells) * rng.uniform(0.05, 0.3), alpha)


def _noise(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """(side, side, 1), about -1 to 1, in patches of side / cells."""
    grain = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grain.resize((side, side), Image.Resampling.BILINEAR))[..., None]


def _ground(rng: np.random.Generator, side: int) -> Image.Image:
    """What may lie under a picture: a gradient, blurred patches, a disc or a badge."""
    one, other = rng.uniform(0, 1, (2, 3))
    line = np.linspace(-1, 1, side)
    rows, columns = np.meshgrid(line, line, indexing="ij")
    whole = np.ones((side, side, 1))
    kind = rng.integers(3)
    if kind == 0:
        angle = rng.uniform(0, 2 * np.pi)
        mixed = ((np.sin(angle) * rows + np.cos(angle) * columns) / 2 + 0.5)[..., None]
        return _picture(one + (other - one) * mixed, whole)
    if kind == 1:
        mixed = _noise(rng, side, int(rng.integers(2, 12))) / 2 + 0.5
        return _picture(one + (other - one) * mixed, whole)
    power = rng.choice([2, 6])
    size = rng.uniform(0.8, 1)
    badge = (np.abs(rows) ** power + np.abs(columns) ** power < size**power)[..., None]
    return _picture(one, badge.astype(np.float32))
