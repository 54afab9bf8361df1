"""What training changes of a recording: how fast, loud, clear and whole it is.

Speed perturbation (Ko et al., Interspeech 2015) changes the pitch with it; gaps in time and
frequency are SpecAugment's (arXiv 1904.08779).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from looptx_core.media.audio.features import FRAMES, MELS, RATE

SLOWEST, FASTEST = 0.88, 1.14
"""Times its own speed."""
_TELEPHONE = 3_400  # hertz, what a telephone lets through


def changed(samples: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Samples at 16 kHz, (n,), at another speed and loudness, with noise and fewer highs."""
    import soxr

    speed = float(np.exp(draw.uniform(np.log(SLOWEST), np.log(FASTEST))))
    changed = soxr.resample(samples, RATE * speed, RATE, quality="MQ")
    changed = np.clip(changed, -8, 8) * np.float32(10 ** (draw.uniform(-6, 6) / 20))
    power = float(np.mean(changed**2)) if len(changed) else 0.0
    wanted = power * 10 ** (-draw.uniform(5, 40) / 10)
    changed = changed + noise(len(changed), draw) * np.float32(np.sqrt(wanted))
    if draw.random() < 0.5:
        size = _fast(len(changed))
        spectrum = np.fft.rfft(changed, size)
        spectrum[round(size * _TELEPHONE / RATE) :] = 0
        changed = np.fft.irfft(spectrum, size)[: len(changed)]
    return changed.astype(np.float32)


def noise(count: int, draw: np.random.Generator) -> np.ndarray:
    """Noise of unit power, (count,), white to brown."""
    size = _fast(count)
    spectrum = np.fft.rfft(draw.standard_normal(size, np.float32))
    tilt = draw.uniform(0, 1.0)
    coloured = np.fft.irfft(spectrum / np.arange(1, len(spectrum) + 1) ** tilt, size)[:count]
    return (coloured / (np.sqrt(np.mean(coloured**2)) + 1e-9)).astype(np.float32)


def _fast(count: int) -> int:
    """The next power of two, of which a Fourier transform is fast."""
    return 1 << max(1, count - 1).bit_length()


def quiet(count: int, draw: np.random.Generator) -> np.ndarray:
    """Silence, or noise in which nothing is said, (count,)."""
    level = 0.0 if draw.random() < 0.2 else 10 ** (-draw.uniform(10, 70) / 20)
    return noise(count, draw) * np.float32(level)


def masked(rows: Tensor, draw: np.random.Generator) -> Tensor:
    """Log-mels with two gaps in frequency and two in time, of the recording's mean."""
    frames = rows.reshape(-1, MELS).clone()
    mean = frames.mean()
    for _ in range(2):
        width = int(draw.integers(0, 16))
        first = int(draw.integers(0, MELS - width + 1))
        frames[:, first : first + width] = mean
        longest = min(len(frames) // 10, 40)
        span = int(draw.integers(0, longest + 1))
        start = int(draw.integers(0, len(frames) - span + 1))
        frames[start : start + span] = mean
    return torch.as_tensor(frames).reshape(-1, FRAMES * MELS)
