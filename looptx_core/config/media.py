"""Sections of a model's configuration, one for each medium that has its settings in one."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from looptx_core.errors import UsageError

_MOST = {"layers": 10_000, "width": 1 << 20, "max_seconds": 3600.0, "token": 1 << 24,
         "frames": 1 << 16, "ctc_weight": 100.0, "fps": 1000.0, "rows": 1 << 10,
         "columns": 1 << 10, "first_code": 1 << 24, "closes": 1 << 24}  # fmt: skip
"""What no model comes near, so that a damaged config.json asks for no more memory than there is."""


def _check(settings: Any, section: str) -> None:
    for field in fields(settings):
        value = getattr(settings, field.name)
        most = _MOST.get(field.name)
        if most is not None and not 0 <= value <= most:
            raise UsageError(
                f"model configuration: {section}.{field.name} must lie between 0 and {most:g}, "
                f"not {value}"
            )


@dataclass(frozen=True)
class AudioConfig:
    """How a model hears. Raises `UsageError` for values that fit no model."""

    layers: int = 0
    """Blocks of the encoder of recordings; 0: the model hears nothing."""
    width: int = 128
    """Width of that encoder, a multiple of head_dim."""
    max_seconds: float = 30.0
    """The longest recording that is heard at once, seconds."""
    token: int = 6
    """The token whose place 80 ms of sound take."""
    attention: Literal["causal", "both"] = "causal"
    """Whether the decoder's tokens of a recording see those before, or all of them."""
    ctc_weight: float = 0.3
    """What the encoder's own loss, CTC over the bytes of the text, counts at first; it falls to a
    third of this. 0: there is none."""

    def __post_init__(self) -> None:
        _check(self, "audio")
        if self.attention not in ("causal", "both"):
            raise UsageError(
                f"model configuration: audio.attention must be causal or both, not "
                f"{self.attention!r}"
            )
        if self.layers and (self.width < 1 or self.max_seconds < 2):
            raise UsageError(
                "model configuration: audio.width must be at least 1, audio.max_seconds at least 2"
            )


@dataclass(frozen=True)
class VideoConfig:
    """How a model watches. Raises `UsageError` for values that fit no model."""

    frames: int = 0
    """The most frames of a clip that are seen, in pairs; 0: the model sees no clips."""
    max_patches: int = 16
    """A frame is scaled, in its own proportions, to as many patches as fit in this number."""
    token: int = 7
    """The token whose place a patch of two frames takes."""

    def __post_init__(self) -> None:
        _check(self, "video")
        if self.frames == 1 or not 1 <= self.max_patches <= 1 << 16:
            raise UsageError(
                "model configuration: video.frames must be 0 or at least 2, video.max_patches at "
                "least 1"
            )


@dataclass(frozen=True)
class WrittenConfig:
    """How a model writes a medium: as codes of a codec, which are tokens after those of the text.

    Raises `UsageError` for values that fit no model.
    """

    codec: str = ""
    """The fingerprint of the codec; empty: the model does not write the medium."""
    rows: int = 0
    """Codes of an item, downwards; of speech as many as it takes, and this is 0."""
    columns: int = 0
    """The same, across; of speech, the codes of one moment."""
    levels: tuple[int, ...] = ()
    """Of each digit of a code."""
    first_code: int = 0
    """The token of code 0."""
    token: int = 0
    """The token that begins an item."""
    digits: bool = True
    """Whether codes share a vector for each level of their digits while they are trained, beside
    one of their own; see `looptx_core.model.code_rows`."""

    SECTION = ""

    @property
    def own(self) -> tuple[str, ...]:
        """The keys that the codec says."""
        return "columns", "levels"

    def __post_init__(self) -> None:
        _check(self, self.SECTION)
        values = [getattr(self, name) for name in self.own]
        if self.codec and not (all(values) and min(self.levels) > 1):
            names = " and ".join(f"{self.SECTION}.{name}" for name in self.own)
            raise UsageError(
                f"model configuration: {names} are a codec's own; leave them out, and give the "
                "codec"
            )

    @property
    def codes(self) -> int:
        """How many codes there are; 0: the model does not write the medium."""
        return math.prod(self.levels) if self.codec else 0

    @property
    def ids(self) -> range:
        """The tokens of the codes."""
        return range(self.first_code, self.first_code + self.codes)


@dataclass(frozen=True)
class DrawConfig(WrittenConfig):
    """How a model draws."""

    token: int = 8
    """The token that begins a picture."""

    SECTION = "draw"

    @property
    def own(self) -> tuple[str, ...]:
        return "rows", "columns", "levels"


@dataclass(frozen=True)
class SpeakConfig(WrittenConfig):
    """How a model speaks: each token of the text, then the codes of its sound, then `closes`."""

    token: int = 9
    """The token that begins speech."""
    closes: int = 10
    """The token after the codes of each token of the text; after those of the last, it ends the
    speech."""

    SECTION = "speak"
