"""A small codec of speech, and recordings whose words are tones of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from looptx_core.config.codec import CodecConfig
from looptx_core.media.batch import MediaItem
from looptx_core.media.codec.codec import Codec

CONFIG = CodecConfig(
    kind="speech", rows=8, columns=2, values=160, window=4, levels=(3, 2, 2), encoder_layers=1,
    encoder_width=32, width=32, head_dim=8, core_layers=2, max_loops=2, bottleneck=16,
)  # fmt: skip
TONES = {"red": 300, "green": 700, "blue": 1500, "black": 3000}
"""Hertz of each word."""


def build(seed: int = 0) -> Codec:
    """One that has learned nothing, but whose codes tell tones apart."""
    torch.manual_seed(seed)
    codec = Codec(CONFIG).eval()
    with torch.no_grad():
        codec.encoder.digits.weight.mul_(8)
    return codec


def tone(hertz: float, seconds: float) -> np.ndarray:
    """(n,) float32 at 16 kHz, fading in and out."""
    time = np.arange(round(seconds * 16_000)) / 16_000
    fade = np.minimum(1, 50 * np.minimum(time, seconds - time))
    return (0.5 * fade * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def write(file: Path, *words: str, seconds: float = 0.24) -> Path:
    soundfile.write(file, np.concatenate([tone(TONES[word], seconds) for word in words]), 16_000)
    return file


def write_records(folder: Path, count: int) -> Path:
    """Recordings of one or two words with their texts, as a file of records."""
    folder.mkdir(parents=True, exist_ok=True)
    names, records = list(TONES), []
    for number in range(count):
        words = [names[number % 4], names[(number // 4) % 4]][: 1 + number % 2]
        write(folder / f"{number}.wav", *words, seconds=0.24 + 0.04 * (number % 3))
        text = " ".join(words)
        records.append({"audio": f"{number}.wav", "text": text, "group": str(number)})
    file = folder / "all.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def even(item: MediaItem, tokens: Sequence[bytes], encoder: Any, where: str) -> list[int]:
    """In place of an alignment: tokens of equal length."""
    frames = 8 * len(item.features)
    return [round(frames * (place + 1) / len(tokens)) for place in range(len(tokens))]
