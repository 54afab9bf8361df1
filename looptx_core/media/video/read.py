"""Clips to tubelets: frames by the time at which they are shown, one decoded at a time.

Animated WebP, GIF and APNG are read by Pillow; MP4, WebM and the like by PyAV, which is an extra.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from looptx_core.config.model import ModelConfig
from looptx_core.documents import open_input
from looptx_core.errors import DataError, MissingError
from looptx_core.media.base import POSITION, Source
from looptx_core.media.batch import MediaItem
from looptx_core.media.image.read import check_size, grid_of, opaque, opened

FASTEST = 25.0
"""The most frames a second that are looked at."""
MOST_FRAMES = 20_000
"""Of a clip that is read: a small file can claim far more."""
_STILL = 0.1  # seconds that a frame is shown where its file says nothing

Frame = tuple[float, float, Image.Image]
"""When a frame is shown, until when, seconds, and the frame."""


def read_clip(source: Source, config: ModelConfig, where: str | None = None) -> MediaItem:
    """Decode a clip, a file or its bytes: frames evenly over its time, two a step.

    The frame of a moment is the last one shown by then, so that a variable rate is no matter.

    Raises:
        DataError: no clip, damaged, over 20,000 frames, or frames that are no pictures.
        MissingError: an MP4, WebM or the like, without PyAV.
    """
    name = where or ("the clip" if isinstance(source, bytes) else str(source))
    frames = _by_av(source, name) if _is_container(source, name) else _by_pillow(source, name)
    kept, size, end, slot = {}, (0, 0), 0.0, 1 / FASTEST
    most = config.video.frames
    for number, (begin, until, frame) in enumerate(frames):
        end = until
        if number >= MOST_FRAMES:
            raise DataError(f"{name}: over {MOST_FRAMES:,} frames; cut the clip first")
        if not number:
            check_size(*frame.size, name)
            rows, columns = grid_of(
                frame.height, frame.width, config.patch_size, config.video.max_patches
            )
            size = (columns * config.patch_size, rows * config.patch_size)
        if int(begin / slot) not in kept:
            check_size(*frame.size, name)
            kept[int(begin / slot)] = begin, np.asarray(opaque(frame, size, name), np.float32)
        if len(kept) > 4 * most:  # a clip of any length keeps a bounded number
            slot *= 2
            merged: dict[int, tuple[float, np.ndarray]] = {}
            for begin, pixels in kept.values():
                merged.setdefault(int(begin / slot), (begin, pixels))
            kept = merged
    if not kept:
        raise DataError(f"{name}: a clip without frames; give another")
    rate = min(FASTEST, most / max(end, 1e-3))
    times = np.arange(max(2, 2 * int(min(most, end * rate + 1e-6) // 2))) / rate
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
    positions = max(1, round(seconds / POSITION))
    return MediaItem("video", features, (steps, rows, columns, positions))


def _by_pillow(source: Source, name: str) -> Iterator[Frame]:
    with opened(source, name) as image:
        count, begin = getattr(image, "n_frames", 1), 0.0
        if count > MOST_FRAMES:
            raise DataError(f"{name}: over {MOST_FRAMES:,} frames; cut the clip first")
        for number in range(count):
            image.seek(number)
            image.load()
            end = begin + (float(image.info.get("duration") or 0) / 1000 or _STILL)
            yield begin, end, image.copy()
            begin = end


def _by_av(source: Source, name: str) -> Iterator[Frame]:
    try:
        import av
    except ImportError as error:
        raise MissingError(f"{name}: needs PyAV; pip install 'looptx[video]'") from error
    content: Any = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        with av.open(content) as container:
            if not container.streams.video:
                raise DataError(f"{name}: has no pictures; give another")
            stream = container.streams.video[0]
            check_size(stream.width, stream.height, name)
            lasts = 1 / float(stream.average_rate or FASTEST)
            first = None
            for frame in container.decode(stream):
                shown = frame.time if frame.time is not None else (first or 0.0)
                first = shown if first is None else first
                picture = frame.to_image()
                if turn := getattr(frame, "rotation", 0):
                    picture = picture.rotate(turn, expand=True)
                yield shown - first, shown - first + lasts, picture
    except (av.FFmpegError, ValueError, OSError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: a damaged clip ({reason}); save it again") from error


def _is_container(source: Source, name: str) -> bool:
    """Whether PyAV is to read it, by its first bytes."""
    try:
        if isinstance(source, bytes):
            head = source[:12]
        else:
            with open_input(source, pipes=False) as file:
                head = file.read(12)
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such clip; check the path") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check the file") from error
    riff = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    return head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3" or riff
