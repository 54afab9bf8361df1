"""Log-mels as Whisper has them (arXiv 2212.04356): 80 Slaney mels, 10 ms a frame, at 16 kHz.

A recording is normalised by itself, and not padded to a fixed length.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from looptx_core.config.codec import MELS

RATE = 16_000
"""Samples a second."""
FRAMES = 8
"""Frames of a token."""
HOP = 160
"""Samples between frames."""
STEP = FRAMES * HOP
"""Samples of a token, 80 ms."""
WINDOW = 400
"""Samples of a frame's spectrum."""


def log_mels(samples: Tensor) -> Tensor:
    """Samples, (n,) float32 at 16 kHz, to rows of 8 frames, (ceil(n / 1280), 8 * 80).

    The end is filled up with silence to whole rows.
    """
    samples = F.pad(samples, (0, -len(samples) % STEP))
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(samples, WINDOW, HOP, window=window, return_complex=True)[:, :-1]
    mels = mel_filters() @ spectrum.abs().square()
    logs = mels.clamp(min=1e-10).log10()
    logs = torch.maximum(logs, logs.max() - 8.0)
    return ((logs + 4.0) / 4.0).T.reshape(-1, FRAMES * MELS)


@functools.cache
def mel_filters() -> Tensor:
    """Triangles of equal area on the mel scale of Slaney's Auditory Toolbox, (80, 201)."""
    edges = _hertz(np.linspace(_mels(0.0), _mels(RATE / 2), MELS + 2))
    bins = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    low, centre, high = (part[:, None] for part in (edges[:-2], edges[1:-1], edges[2:]))
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    triangles = np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)
    return torch.tensor(triangles, dtype=torch.float32)


_LOGARITHMIC = 1000.0  # hertz, above which the scale is logarithmic
_STEP = np.log(6.4) / 27  # of a mel there


def _mels(hertz: float) -> float:
    linear = hertz * 3 / 200
    return linear if hertz < _LOGARITHMIC else 15 + np.log(hertz / _LOGARITHMIC) / _STEP


def _hertz(mels: np.ndarray) -> np.ndarray:
    return np.where(mels < 15, mels * 200 / 3, _LOGARITHMIC * np.exp((mels - 15) * _STEP))
