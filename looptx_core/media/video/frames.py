"""Frames of a clip with their times, one decoded at a time: from files, and from a pipe.

Animated WebP, GIF and APNG are read by Pillow; MP4, WebM and the like by PyAV, which is an extra.
A pipe has PNG, JPEG or PPM pictures one after another, as ffmpeg's image2pipe writes them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image

from looptx_core.documents import open_input
from looptx_core.errors import DataError, MissingError
from looptx_core.media.base import Source
from looptx_core.media.image.read import MOST_BYTES, check_size, opened

FASTEST = 25.0
"""The most frames a second that are looked at."""
MOST_FRAMES = 20_000
"""Of a clip that is read: a small file can claim far more."""
MOST_PIXELS = 50_000_000_000
"""Of all frames together, so that no small file takes hours."""
_STILL = 0.1  # seconds that a frame is shown where its file says nothing
_LONGEST_HEADER = 4096  # bytes of a PPM
_PNG, _JPEG, _PPM = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"P6"

Frame = tuple[float, float, Image.Image]
"""When a frame is shown, until when, seconds, and the frame."""


def frames_of(source: Source, name: str) -> Iterator[Frame]:
    """The frames of a file or of its bytes. name: what errors call it."""
    frames = _by_av(source, name) if _is_container(source, name) else _by_pillow(source, name)
    return within_limits(frames, name)


def within_limits(frames: Iterable[Frame], name: str) -> Iterator[Frame]:
    """The same frames. Raises `DataError` where they are too many, or too large together."""
    pixels = 0
    for number, frame in enumerate(frames):
        if number >= MOST_FRAMES:
            raise DataError(f"{name}: over {MOST_FRAMES:,} frames; cut the clip first")
        pixels += frame[2].width * frame[2].height
        if pixels > MOST_PIXELS:
            raise DataError(
                f"{name}: over {MOST_PIXELS:,} pixels in all frames; cut the clip, or scale it down"
            )
        yield frame


def frames_of_pipe(pipe: io.BufferedIOBase, rate: float, name: str) -> Iterator[Frame]:
    """The pictures of a pipe, each as soon as it has come. rate: frames a second.

    Raises `DataError` for what is no PNG, JPEG or PPM, and for a picture that is cut off.
    """
    pictures = _Pictures(pipe, name)
    while (picture := pictures.next()) is not None:
        yield (pictures.number - 1) / rate, pictures.number / rate, picture


class _Pictures:
    """Cuts a pipe into pictures, each within the limit of a file's size."""

    def __init__(self, pipe: io.BufferedIOBase, name: str) -> None:
        self.pipe, self.of, self.number = pipe, name, 0
        self.ahead = bytearray()  # read, from the start of the picture
        self.at = 0  # in it, what comes next

    @property
    def name(self) -> str:
        return f"{self.of}, frame {self.number + 1}"

    def next(self) -> Image.Image | None:
        """The next picture; None at the end of the pipe."""
        if not self.ahead and not self._more():
            return None
        head = self._take(2)
        if head == _PNG[:2]:
            self._to_end_of_png()
        elif head == _JPEG:
            self._to_end_of_jpeg()
        elif head == _PPM:
            size = self._to_end_of_ppm()
        else:
            raise DataError(
                f"{self.name}: no PNG, JPEG or PPM; write frames as by ffmpeg -f image2pipe -c:v "
                "png, or name a file"
            )
        content = bytes(self.ahead[: self.at])
        del self.ahead[: self.at]
        self.at = 0
        if head == _PPM:
            width, height = size
            picture = Image.frombytes("RGB", size, content[-3 * width * height :])
        else:
            with opened(content, self.name) as image:
                image.load()
                picture = image.copy()
        self.number += 1
        return picture

    def _to_end_of_png(self) -> None:
        self._take(len(_PNG) - 2)
        kind = b""
        while kind != b"IEND":
            length, kind = int.from_bytes(self._take(4), "big"), self._take(4)
            self._take(length + 4)

    def _to_end_of_jpeg(self) -> None:
        while (marker := self._marker()) != 0xD9:
            if marker > 1 and not 0xD0 <= marker <= 0xD8:  # those have no content
                self._take(max(0, int.from_bytes(self._take(2), "big") - 2))

    def _marker(self) -> int:
        """The next marker of a JPEG, without its first byte."""
        while (found := self.ahead.find(b"\xff", self.at)) < 0:
            self.at = len(self.ahead)
            self._need(1)
        self.at = found + 1
        while (byte := self._take(1)[0]) == 0xFF:
            pass
        return byte

    def _to_end_of_ppm(self) -> tuple[int, int]:
        """-> width and height."""
        width, height, most = (self._ppm_number() for _ in range(3))
        if most != 255:
            raise DataError(f"{self.name}: a PPM of {most + 1:,} values; write 8 bits a colour")
        check_size(width, height, self.name)
        self._take(3 * width * height)
        return width, height

    def _ppm_number(self) -> int:
        """The next number of a PPM's header, with the byte after it."""
        digits, in_comment = b"", False
        while self.at < _LONGEST_HEADER:
            byte = self._take(1)
            in_comment = byte == b"#" or (in_comment and byte != b"\n")
            if byte.isdigit() and not in_comment:
                digits += byte
            elif digits:
                return int(digits)
        raise DataError(f"{self.name}: a PPM without a header; check what writes the pipe")

    def _take(self, count: int) -> bytes:
        self._need(count)
        self.at += count
        return bytes(self.ahead[self.at - count : self.at])

    def _need(self, count: int) -> None:
        if self.at + count > MOST_BYTES:
            raise DataError(f"{self.name}: damaged, or over {MOST_BYTES:,} bytes")
        while len(self.ahead) < self.at + count:
            if not self._more():
                raise DataError(f"{self.name}: ends early; check what writes the pipe")

    def _more(self) -> bool:
        chunk = self.pipe.read1(1 << 16)
        self.ahead += chunk
        return bool(chunk)


def _by_pillow(source: Source, name: str) -> Iterator[Frame]:
    with opened(source, name, "clip", "animated WebP, GIF, APNG, MP4 or WebM") as image:
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
