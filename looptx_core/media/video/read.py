"""Clips to tubelets: frames evenly over their time, two a step."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image

from looptx_core.config.model import ModelConfig
from looptx_core.errors import DataError
from looptx_core.media.base import POSITION, Source
from looptx_core.media.batch import MediaItem
from looptx_core.media.image.augment import Change, changed, draw_change
from looptx_core.media.image.read import check_size, grid_of, in_colour, opaque, opened
from looptx_core.media.video.frames import FASTEST, Frame, frames_of, frames_of_pipe, within_limits

_ROUNDING = 1e-6  # of a slot, so that none at the fastest rate falls into the one before


def read_clip(
    source: Source,
    config: ModelConfig,
    where: str | None = None,
    augment: np.random.Generator | None = None,
) -> MediaItem:
    """Decode a clip, a file or its bytes: frames evenly over its time, two a step.

    The frame of a moment is the last one shown by then, so that a variable rate is no matter.

    Args:
        where: what to call it in errors; absent: its path.
        augment: draws a change of place, scale, turn and colours for all frames alike, for
            training. Nothing is mirrored, in space or in time.
    Raises:
        DataError: no clip, damaged, beyond the limits of `frames`, or frames that are no pictures.
        MissingError: an MP4, WebM or the like, without PyAV.
    """
    name = where or ("the clip" if isinstance(source, bytes) else str(source))
    change = draw_change(augment) if augment else None
    return _evenly(frames_of(source, name), config, name, change)


def read_pipe(
    pipe: io.BufferedIOBase, config: ModelConfig, rate: float, name: str = "the pipe"
) -> MediaItem:
    """A clip from pictures that come one after another, until the pipe ends; see `read_clip`.

    rate: frames a second. Raises `DataError` as `frames_of_pipe` does.
    """
    return _evenly(within_limits(frames_of_pipe(pipe, rate, name), name), config, name)


Still = Image.Image | np.ndarray | bytes
"""A frame: a picture, its pixels (height, width, 3) from 0 to 255, or a picture file's content."""


class Eye:
    """Sees frames as a model does: all of the first one's size, in patches."""

    def __init__(self, config: ModelConfig, name: str, change: Change | None = None) -> None:
        self.config, self.name, self.change = config, name, change
        self.size: tuple[int, int] | None = None
        """Width and height in pixels, once a frame was seen."""

    def fit(self, frame: Image.Image) -> None:
        """Take the first frame's size for all; errors as of `see`."""
        check_size(*frame.size, self.name)
        if self.size is None:
            patch, most = self.config.patch_size, self.config.video.max_patches
            rows, columns = grid_of(frame.height, frame.width, patch, most)
            self.size = columns * patch, rows * patch

    @property
    def tokens(self) -> int:
        """Of a step of two frames."""
        assert self.size is not None, "no frame was seen"
        return math.prod(side // self.config.patch_size for side in self.size)

    def see(self, still: Still) -> np.ndarray:
        """(height, width, 3) from 0 to 255. Raises `DataError` for one that can't be read or is of
        no bearable size."""
        frame = _picture(still, self.name)
        self.fit(frame)
        assert self.size is not None
        if self.change is not None:
            return (changed(in_colour(frame, self.name), self.size, self.change) + 1) * 127.5
        return np.asarray(opaque(frame, self.size, self.name), np.float32)


def measure_clip(
    source: Source, config: ModelConfig, where: str | None = None
) -> tuple[int, int, int, int]:
    """The grid of a clip, from its frames' times. Errors: those of `read_clip`."""
    name = where or ("the clip" if isinstance(source, bytes) else str(source))
    eye, end = Eye(config, name), 0.0
    for _, until, frame in frames_of(source, name):
        end = until
        if eye.size is None:
            eye.fit(frame)
    if eye.size is None:
        raise DataError(f"{name}: a clip without frames; give another")
    count, rate = _moments(end, config.video.frames)
    width, height = (side // config.patch_size for side in eye.size)
    return count // 2, height, width, _positions(2 / rate)


def _moments(end: float, most: int) -> tuple[int, float]:
    """How many frames of a clip of so many seconds are looked at, two a step, and how many a
    second."""
    rate = min(FASTEST, most / max(end, 1e-3))
    return max(2, 2 * int(min(most, end * rate + 1e-6) // 2)), rate


def _positions(seconds: float) -> int:
    """Of one step."""
    return max(1, round(seconds / POSITION))


def _picture(still: Still, name: str) -> Image.Image:
    if isinstance(still, Image.Image):
        return still
    if isinstance(still, np.ndarray):
        if still.ndim != 3 or still.shape[2] != 3 or still.dtype != np.uint8:
            raise DataError(
                f"{name}: {still.dtype} numbers of shape {still.shape}; give uint8 of (height, "
                "width, 3)"
            )
        return Image.fromarray(still)
    with opened(still, name) as image:
        image.load()
        return image.copy()


def _evenly(
    frames: Iterable[Frame], config: ModelConfig, name: str, change: Change | None = None
) -> MediaItem:
    eye, most = Eye(config, name, change), config.video.frames
    kept: dict[int, tuple[float, np.ndarray]] = {}
    end, slot = 0.0, 1 / FASTEST
    for begin, until, frame in frames:
        end = until
        number = int(begin / slot + _ROUNDING)
        if number not in kept:
            kept[number] = begin, eye.see(frame)
        if len(kept) > 4 * most:  # a clip of any length keeps a bounded number
            slot *= 2
            merged: dict[int, tuple[float, np.ndarray]] = {}
            for begin, pixels in kept.values():
                merged.setdefault(int(begin / slot + _ROUNDING), (begin, pixels))
            kept = merged
    if not kept:
        raise DataError(f"{name}: a clip without frames; give another")
    count, rate = _moments(end, most)
    times = np.arange(count) / rate
    begins = [begin for begin, _ in kept.values()]
    chosen = np.maximum(np.searchsorted(begins, times + 1e-6) - 1, 0)
    shown = [pixels for _, pixels in kept.values()]
    return tubelets([shown[index] for index in chosen], 2 / rate, config)


def tubelets(frames: Iterable[np.ndarray], seconds: float, config: ModelConfig) -> MediaItem:
    """Frames of one size, (height, width, 3) from 0 to 255, as an item; the last may have none
    beside it.

    Height and width are multiples of the patch. seconds: from one pair to the next.
    """
    pixels = np.stack([np.asarray(frame, np.float32) for frame in frames]) / 127.5 - 1
    pixels = np.concatenate([pixels, pixels[-1:]]) if len(pixels) % 2 else pixels
    side = config.patch_size
    count, height, width, _ = pixels.shape
    cut = torch.from_numpy(pixels.astype(np.float32)).view(
        count // 2, 2, height // side, side, width // side, side, 3
    )
    steps, rows, columns = count // 2, height // side, width // side
    features = cut.permute(0, 2, 4, 1, 3, 5, 6).reshape(steps * rows * columns, -1)
    return MediaItem("video", features, (steps, rows, columns, _positions(seconds)))
