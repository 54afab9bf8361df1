"""Tones that stand for words: sounds that tests make, and a model that is small enough for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from looptx_core.config.media import AudioConfig
from looptx_core.config.model import ModelConfig

RATE = 16_000
WORDS = {"low": 300.0, "mid": 900.0, "high": 2000.0}
SHAPE = ModelConfig(
    d_model=48, n_heads=4, n_kv_heads=2, head_dim=12, d_ff=64, prelude_layers=1, core_layers=1,
    coda_layers=0, max_loops=3, max_seq_len=96,
)  # fmt: skip
HEARING = replace(SHAPE, audio=AudioConfig(layers=1, width=48))


def spoken(words: list[str], seconds: float = 0.32, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Each word as a tone, with silence around it."""
    draw = np.random.default_rng(seed)
    silence = np.zeros(int(0.08 * rate))
    parts = [silence]
    for word in words:
        time = np.arange(int(seconds * rate)) / rate
        tone = 0.3 * np.sin(2 * np.pi * WORDS[word] * draw.uniform(0.95, 1.05) * time)
        parts += [tone * np.hanning(len(time)) ** 0.25, silence]
    sound = np.concatenate(parts)
    return (sound + 0.003 * draw.standard_normal(len(sound))).astype(np.float32)


def write_recordings(folder: Path, count: int = 24) -> Path:
    """Recordings of two words with their texts, as records; voices of four each."""
    records: list[dict[str, Any]] = []
    names = list(WORDS)
    for number in range(count):
        words = [names[number % 3], names[number // 3 % 3]]
        soundfile.write(folder / f"{number}.wav", spoken(words, seed=number), RATE)
        voice = f"v{number // 4}"
        records.append({"audio": f"{number}.wav", "text": " ".join(words), "group": voice})
    file = folder / "all.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def mels(tokens: int, seed: int = 0) -> torch.Tensor:
    """Rows of an item, drawn."""
    return torch.randn(tokens, 640, generator=torch.Generator().manual_seed(seed))
