"""A small model of pictures and text, and what is put into it."""

from __future__ import annotations

import io
from typing import Any

import test_model
import torch
from PIL import Image

from looptx_core.config.model import ModelConfig
from looptx_core.model.loop import LoopedTransformer

CONFIG = ModelConfig(
    vocab_size=300, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_seq_len=96,
    vision_layers=2, vision_width=32, patch_size=4, max_patches=12,
)  # fmt: skip
IMG = CONFIG.image_token


def build(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float64) -> LoopedTransformer:
    return test_model.build(config, dtype)


def row(*parts: int | tuple[int, int]) -> list[int]:
    """Tokens; a pair is a picture of so many rows and columns."""
    out: list[int] = []
    for part in parts:
        out += [part] if isinstance(part, int) else [IMG] * (part[0] * part[1])
    return out


def letters():
    from looptx_core.data.tokenizer import train_tokenizer

    return train_tokenizer(["abcd efgh " * 50, "aab bbc ccd dda ab cd ef gh " * 50], 280)


def png(size: tuple[int, int], mode: str = "RGB", color: Any = 0, **how: Any) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, "PNG", **how)
    return out.getvalue()
