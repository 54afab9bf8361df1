"""From log-mels to sound: Griffin-Lim, or a vocoder that was given in its place.

The magnitudes of a spectrum are the non-negative ones that have these mels (multiplicative updates,
Lee and Seung, NIPS 2000); the phases are found by Griffin-Lim with momentum (Perraudin et al.,
WASPAA 2013), from random ones.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from looptx_core.media.audio.features import HOP, RATE, WINDOW, mel_filters

Vocoder = Callable[[Tensor, int], Tensor]
"""(frames (n, 80) from -1 to 1 as of `coded.frames_of`, seed) -> samples (m,) at 16 kHz."""
LOUDEST = 0.7
"""The largest sample of what is written."""
_MOMENTUM = 0.99 / 1.99


def griffin_lim(frames: Tensor, seed: int, rounds: int = 32) -> Tensor:
    """Samples, (n x 160,) float32, of frames (n, 80), -1 to 1. seed: of the phases."""
    filters = mel_filters()
    power = 10 ** (4 * (frames.float().cpu().T - 1))
    spectrum = (torch.linalg.pinv(filters) @ power).clamp(min=1e-8)
    for _ in range(20):
        ratio = (filters.T @ power) / (filters.T @ (filters @ spectrum)).clamp(min=1e-12)
        spectrum = spectrum * ratio
    sizes = torch.nn.functional.pad(spectrum.sqrt(), (0, 1))
    draw = torch.Generator().manual_seed(seed)
    phases = 2 * torch.pi * torch.rand(sizes.shape, generator=draw)
    turns, before = torch.polar(torch.ones_like(sizes), phases), torch.zeros(1)
    window, length = torch.hann_window(WINDOW), len(frames) * HOP
    for _ in range(rounds):
        samples = torch.istft(sizes * turns, WINDOW, HOP, window=window, length=length)
        found = torch.stft(samples, WINDOW, HOP, window=window, return_complex=True)
        ahead = found - _MOMENTUM * before
        turns, before = ahead / ahead.abs().clamp(min=1e-12), found
    return torch.istft(sizes * turns, WINDOW, HOP, window=window, length=length)


_vocoder: Vocoder = griffin_lim


def use_vocoder(vocoder: Vocoder | None) -> None:
    """Let a vocoder, such as a neural one, make the sound in this process; None: Griffin-Lim."""
    global _vocoder
    _vocoder = vocoder or griffin_lim


def to_sound(frames: Tensor, seed: int) -> np.ndarray:
    """Samples at 16 kHz, (n,) float32, of frames (n, 80), as loud as `LOUDEST`."""
    samples = _vocoder(frames, seed).numpy().astype(np.float32)
    loudest = float(np.abs(samples).max()) if len(samples) else 0.0
    return samples * (LOUDEST / loudest) if loudest > 1e-5 else samples


def to_file(samples: np.ndarray, kind: str = "WAV") -> bytes:
    """The content of a sound file of this kind, as libsndfile names it."""
    import soundfile

    file = io.BytesIO()
    subtype = "VORBIS" if kind == "OGG" else "PCM_16"
    soundfile.write(file, samples, RATE, format=kind, subtype=subtype)
    return file.getvalue()
