"""Recordings to samples at 16 kHz, one channel: as a stream, so that no length fills the memory.

WAV, FLAC, OGG, MP3 and AIFF are read by libsndfile; the sound of MP4, WebM and the like by PyAV,
which is an extra.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from looptx_core.config.model import ModelConfig
from looptx_core.documents import open_input
from looptx_core.errors import DataError, MissingError
from looptx_core.media.audio.augment import changed, masked
from looptx_core.media.audio.features import RATE, STEP, log_mels
from looptx_core.media.base import Chunk, Source, clock
from looptx_core.media.batch import MediaItem

FORMATS = "WAV, FLAC, OGG, MP3 or AIFF"
_BLOCK = 1 << 20
"""Values that are decoded at once, of all channels together."""
_OVERLAP = 0.4
"""Seconds on either side of a cut that both pieces have."""
_RATES = range(1_000, 1_000_001)
_TRUNCATED = 0.9
"""The share of what a header claims that a file must hold."""


class Header(NamedTuple):
    """What a file says of itself."""

    seconds: float
    """0 where the file does not say."""
    rate: int
    channels: int


def measure(source: Source, config: ModelConfig, where: str | None = None) -> tuple[int]:
    """The tokens of a recording, by its header. Errors: `read_recording`'s."""
    name = _name(source, where)
    return (_tokens(_checked(read_header(source, name), config, name), config),)


def read_recording(
    source: Source,
    config: ModelConfig,
    where: str | None = None,
    augment: np.random.Generator | None = None,
) -> MediaItem:
    """Decode a recording, a file or its bytes, to log-mels, 80 ms a row.

    Args:
        where: what to call it in errors; absent: its path.
        augment: draws speed, loudness, noise, bandwidth and gaps, for training.
    Raises:
        DataError: not a recording, without samples, truncated, with samples that are no numbers,
            or longer than `audio.max_seconds`.
        MissingError: the sound of a video, without PyAV.
    """
    name = _name(source, where)
    claimed = _checked(read_header(source, name), config, name)
    most = round((claimed or config.audio.max_seconds) * RATE)
    parts, count = [], 0
    for block in stream(source, name):
        if not claimed and count + len(block) > most:
            raise _too_long((count + len(block)) / RATE, config, name)
        parts.append(block[: most - count])
        count += len(parts[-1])
        if count >= most:
            break
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return item_of(samples, augment)


def pieces(source: Source, config: ModelConfig, where: str | None = None) -> Iterator[Chunk]:
    """A recording of any length, cut where it is quiet into pieces that overlap a little.

    A piece and a block are in memory at a time. Errors: `read_recording`'s, but for the length.
    """
    name = _name(source, where)
    window, overlap = round(config.audio.max_seconds * RATE), round(_OVERLAP * RATE)
    held, begin, own = np.zeros(0, np.float32), 0, 0
    for block in stream(source, name):
        held = np.concatenate([held, block])
        while len(held) > window:
            cut = _quietest(held[: window - overlap], own)
            item = item_of(held[: cut + overlap])
            yield Chunk((begin + own) / RATE, (begin + cut) / RATE, item)
            held, begin, own = held[cut - overlap :], begin + cut - overlap, overlap
    yield Chunk((begin + own) / RATE, (begin + len(held)) / RATE, item_of(held))


def _quietest(samples: np.ndarray, own: int) -> int:
    """Where to cut: the middle of the quietest fifth of a second in the last half.

    own: samples at the start that the piece before has, too.
    """
    first = max(len(samples) // 2, own + STEP)
    steps = (len(samples) - first) // STEP
    power = (samples[first : first + steps * STEP].reshape(steps, STEP) ** 2).mean(1)
    smooth = np.convolve(power, np.ones(3) / 3, "same") if steps > 3 else power
    return first + int(smooth.argmin()) * STEP + STEP // 2


def samples_of(source: Source, name: str, most: float) -> np.ndarray:
    """All samples of a recording at 16 kHz, (n,) float32, at least one.

    most: seconds. Raises the errors of `stream`, and `DataError` for a longer recording.
    """
    parts, count = [np.zeros(0, np.float32)], 0
    for block in stream(source, name):
        parts.append(block)
        count += len(block)
        if count > most * RATE:
            raise DataError(f"{name}: longer than {most:g} s; cut it into sentences")
    return np.concatenate(parts) if count else np.zeros(1, np.float32)


def item_of(samples: np.ndarray, augment: np.random.Generator | None = None) -> MediaItem:
    """Samples at 16 kHz, (n,) float32, as an item. A recording too short for one is silence."""
    if not len(samples):
        samples = np.zeros(1, np.float32)
    if augment is not None:
        samples = changed(samples, augment)
    rows = log_mels(torch.from_numpy(np.ascontiguousarray(samples, np.float32)))
    if augment is not None:
        rows = masked(rows, augment)
    return MediaItem("audio", rows, (len(rows),))


def read_header(source: Source, name: str) -> Header:
    """What a file says of itself. Raises `DataError`."""
    if _needs_av(source, name):
        with _av_sound(source, name) as (container, sound):
            length = sound.duration * sound.time_base if sound.duration else 0
            seconds = float(length) or (container.duration or 0) / 1e6
            return _plausible(Header(seconds, sound.rate, sound.channels), name)
    _check_bytes(source, name)
    with _sound_file(source, name) as file:
        header = Header(file.frames / max(1, file.samplerate), file.samplerate, file.channels)
        return _plausible(header, name)


def stream(source: Source, name: str) -> Iterator[np.ndarray]:
    """The samples at 16 kHz, one channel, (n,) float32 blocks of bounded size.

    Raises `DataError` for no samples, for less than the header claims, for NaN and infinity.
    """
    import soxr

    header = read_header(source, name)
    resample = soxr.ResampleStream(header.rate, RATE, 1, dtype="float32")
    blocks = _decoded_by_av(source, name) if _needs_av(source, name) else _decoded(source, name)
    count = 0
    for block in blocks:
        if not np.isfinite(block).all():
            raise DataError(f"{name}: has samples that are no numbers (NaN or infinity); "
                            "record or save it again")  # fmt: skip
        count += len(block)
        yield resample.resample_chunk(block)
    seconds = count / header.rate
    if count == 0:
        raise DataError(f"{name}: a recording without samples; give another")
    if seconds < _TRUNCATED * header.seconds:
        raise DataError(
            f"{name}: holds {seconds:.1f} s of the {header.seconds:.1f} s that its header claims; "
            "it is truncated or damaged, so save it again"
        )
    yield resample.resample_chunk(np.zeros(0, np.float32), last=True)


def _check_bytes(source: Source, name: str) -> None:
    """Refuse a WAV or AIFF file much shorter than it claims: libsndfile reads what is there."""
    head = _head(source, name)
    if head[:4] + head[8:] not in (b"RIFFWAVE", b"FORMAIFF", b"FORMAIFC"):
        return
    claimed = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big")
    # A recorder that could not go back to write the length leaves 0 or as much as fits.
    if not 0 < claimed < 0x7FFFFFFF:
        return
    held = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    if held - 8 < _TRUNCATED * claimed:
        raise DataError(
            f"{name}: holds {held:,} of the {claimed + 8:,} bytes that its header claims; it is "
            "truncated or damaged, so save it again"
        )


def _plausible(header: Header, name: str) -> Header:
    if header.rate not in _RATES or header.channels < 1:
        raise DataError(
            f"{name}: {header.channels} channels at {header.rate} samples a second are no "
            "recording; save it again"
        )
    return header


def _checked(header: Header, config: ModelConfig, name: str) -> float:
    """The seconds that a header claims, which the model must be able to hear at once."""
    if header.seconds > config.audio.max_seconds + 1e-3:
        raise _too_long(header.seconds, config, name)
    return header.seconds


def _too_long(seconds: float, config: ModelConfig, name: str) -> DataError:
    return DataError(
        f"{name}: {clock(seconds)} long or more, and this model hears "
        f"{config.audio.max_seconds:g} s at once; cut it, or hear it in pieces by `timestamps`"
    )


def _tokens(seconds: float, config: ModelConfig) -> int:
    return max(1, math.ceil(round((seconds or config.audio.max_seconds) * RATE) / STEP))


def _decoded(source: Source, name: str) -> Iterator[np.ndarray]:
    """Blocks of one channel at the file's own rate, (n,)."""
    import soundfile

    with _sound_file(source, name) as file:
        frames = max(1, _BLOCK // file.channels)
        while True:
            try:
                block = file.read(frames, dtype="float32", always_2d=True)
            except (soundfile.SoundFileError, RuntimeError) as error:
                raise _damaged(name, error) from error
            if not len(block):
                return
            yield block.mean(1)


def _sound_file(source: Source, name: str) -> Any:
    import soundfile

    try:
        content = io.BytesIO(source) if isinstance(source, bytes) else str(Path(source))
        return soundfile.SoundFile(content)
    except (soundfile.SoundFileError, RuntimeError, OSError, ValueError) as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> DataError:
    reason = str(error).rpartition(": ")[2].strip().rstrip(".") or type(error).__name__
    if "internal error" in reason.lower():  # libsndfile's word for what it can't make out
        reason = "damaged"
    return DataError(f"{name}: not a recording that can be read ({reason.lower()}); give {FORMATS}")


def _needs_av(source: Source, name: str) -> bool:
    """Whether it is a container of videos, by its first bytes."""
    head = _head(source, name)
    return head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3"


def _head(source: Source, name: str) -> bytes:
    """The first 12 bytes."""
    if isinstance(source, bytes):
        return source[:12]
    try:
        with open_input(Path(source), pipes=False) as file:
            return file.read(12)
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such recording; check the path") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check the file") from error


class _av_sound:
    """A container of videos, opened, with its first stream of sound."""

    def __init__(self, source: Source, name: str) -> None:
        self.source, self.name = source, name

    def __enter__(self) -> tuple[Any, Any]:
        try:
            import av
        except ImportError as error:
            raise MissingError(
                f"{self.name}: the sound of a video needs PyAV; pip install 'looptx[video]'"
            ) from error
        source = io.BytesIO(self.source) if isinstance(self.source, bytes) else str(self.source)
        try:
            self.container = av.open(source)
        except (av.FFmpegError, ValueError, OSError) as error:
            raise _damaged(self.name, error) from error
        sounds = self.container.streams.audio
        if not sounds:
            self.container.close()
            raise DataError(f"{self.name}: has no sound; give another")
        return self.container, sounds[0]

    def __exit__(self, *_: object) -> None:
        self.container.close()


def _decoded_by_av(source: Source, name: str) -> Iterator[np.ndarray]:
    with _av_sound(source, name) as (container, sound):
        import av

        plain = av.AudioResampler("fltp", "mono", sound.rate)
        try:
            for frame in container.decode(sound):
                for part in plain.resample(frame):
                    yield part.to_ndarray()[0]
            for part in plain.resample(None):
                yield part.to_ndarray()[0]
        except (av.FFmpegError, ValueError) as error:
            raise _damaged(name, error) from error


def _name(source: Source, where: str | None) -> str:
    if where is not None:
        return where
    return "the recording" if isinstance(source, bytes) else str(source)
