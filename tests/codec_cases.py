"""A small codec, and pictures of one colour each for it."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from looptx_core.config.codec import CodecConfig
from looptx_core.media.codec.codec import Codec

CONFIG = CodecConfig(
    rows=2, columns=2, values=48, levels=(3, 2, 2), encoder_layers=1, encoder_width=32, width=32,
    head_dim=8, core_layers=2, max_loops=2, bottleneck=16,
)  # fmt: skip
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 40), "blue": (20, 40, 220),
           "black": (10, 10, 10)}  # fmt: skip


def build(config: CodecConfig = CONFIG, seed: int = 0) -> Codec:
    torch.manual_seed(seed)
    return Codec(config).eval()


def telling(seed: int = 0) -> Codec:
    """One that has learned nothing either, but whose codes tell the colours apart."""
    codec = build(seed=seed)
    with torch.no_grad():
        codec.encoder.digits.weight.mul_(8)
    return codec


def pictures(count: int) -> Tensor:
    """(count, 4, 48) of bytes, in turn of each colour, with a little noise."""
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    flat = colours[torch.arange(count) % len(colours)].repeat(1, 16)[:, None].expand(-1, 4, -1)
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    return (flat + 5 * noise).clamp(0, 255).to(torch.uint8)


def write_picture(file: Path, colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> Path:
    Image.new("RGB", size, colour).save(file)
    return file


def write_pictures(folder: Path, count: int) -> list[tuple[str, str]]:
    """Pictures in turn of each colour, a little different; returns (file's name, colour)."""
    folder.mkdir()
    found = []
    for number in range(count):
        name = list(COLOURS)[number % len(COLOURS)]
        red, green, blue = COLOURS[name]
        shade = (red, min(255, green + number // 4), blue)
        write_picture(folder / f"{number}.png", shade)
        found.append((f"{number}.png", name))
    return found
