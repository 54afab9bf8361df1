"""Recordings as a codec hears them: log-mels of one loudness, cut into patches of time and band.

A log-mel of a recording spans 80 dB below its loudest place, which become the numbers from -1 to 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from looptx_core.config.codec import MELS, CodecConfig
from looptx_core.media.audio.features import HOP, RATE, log_mels
from looptx_core.media.audio.read import samples_of
from looptx_core.media.base import Grid, Source

MOST_SECONDS = 600.0
"""The longest recording that a codec is trained on."""
DECIBELS = 40.0
"""Of a step of 1 in the numbers of a patch."""
_SILENT = -1.4  # the loudest place of a recording in which nothing is


def frames_of(samples: Tensor) -> Tensor:
    """Samples, (n,) at 16 kHz, as frames of 10 ms, (frames, 80), -1 to 1."""
    logs = log_mels(samples).reshape(-1, MELS)
    loudest = logs.max()
    return logs - loudest + 1 if loudest > _SILENT else torch.full_like(logs, -1.0)


def to_patches(frames: Tensor, config: CodecConfig) -> Tensor:
    """Frames (frames, 80) as patches (rows x columns, numbers), with silence at the end."""
    frames = F.pad(frames, (0, 0, 0, -len(frames) % config.frames), value=-1.0)
    cut = frames.view(-1, config.frames, config.columns, MELS // config.columns)
    return cut.transpose(1, 2).reshape(-1, config.values)


def to_frames(patches: Tensor, config: CodecConfig) -> Tensor:
    """The inverse of `to_patches`, with the silence at the end."""
    cut = patches.reshape(-1, config.columns, config.frames, MELS // config.columns)
    return cut.transpose(1, 2).reshape(-1, MELS)


def grid_of(patches: Tensor, config: CodecConfig) -> Grid:
    """Rows and columns of patches (rows x columns, ...)."""
    return len(patches) // config.columns, config.columns


def stretches(frames: Tensor, config: CodecConfig) -> Tensor:
    """A recording, (frames, 80), as overlapping stretches, (n, rows x columns, numbers).

    They begin at different places within a patch, so that a codec learns no place by heart.
    """
    length = config.rows * config.frames
    step = max(1, length // 4) | 1  # odd, so that patches of an even number of frames differ
    last = max(0, len(frames) - length)
    frames = F.pad(frames, (0, 0, 0, max(0, length - len(frames))), value=-1.0)
    starts = [*range(0, last, step), last]
    return torch.stack([to_patches(frames[start : start + length], config) for start in starts])


def training_items(source: Source, config: CodecConfig, where: str | None = None) -> Tensor:
    """What a codec learns of a recording: its stretches, (n, patches, numbers) of bytes; errors:
    those of `samples_of`."""
    name = where or ("the recording" if isinstance(source, bytes) else str(source))
    samples = samples_of(source, name, MOST_SECONDS)
    numbers = stretches(frames_of(torch.from_numpy(samples)), config)
    return ((numbers + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def seconds_of(rows: int, config: CodecConfig) -> float:
    """How long so many rows of patches are."""
    return rows * config.frames * HOP / RATE
