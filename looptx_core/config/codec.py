"""What a codec is: the numbers that fix its shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from looptx_core.errors import UsageError

_MOST = {"rows": 1 << 10, "window": 1 << 10, "columns": 1 << 10, "values": 1 << 16,
         "encoder_layers": 1000,
         "encoder_width": 1 << 14, "width": 1 << 14, "prelude_layers": 1000, "core_layers": 1000,
         "coda_layers": 1000, "max_loops": 1 << 10, "bottleneck": 1 << 14,
         "head_dim": 1 << 12}  # fmt: skip
"""What no codec comes near, so that a damaged file asks for no more memory than there is."""
MELS = 80
"""Bands of a log-mel, from low to high."""
MEDIUM_OF = {"picture": "image", "speech": "audio"}
"""The medium of a kind of codec."""
SECTION_OF = {"picture": "draw", "speech": "speak"}
"""The section of a model's configuration that names a codec of a kind."""
SHAPES: dict[str, dict[str, Any]] = {
    "picture": {},
    "speech": {"rows": 32, "columns": 2, "values": 160, "window": 16},
}
"""What codecs of a kind have by default, where it is not what the fields say."""
_MAY_BE_0 = ("window", "encoder_layers", "prelude_layers", "coda_layers")


@dataclass(frozen=True)
class CodecConfig:
    """The shape of a codec: patches to codes, and a looped detokeniser from codes to patches.

    Raises `UsageError` for values that fit no codec.
    """

    kind: Literal["picture", "speech"] = "picture"
    """What its patches are cut from: pictures, or log-mels of 10 ms a frame."""
    rows: int = 6
    """Patches downwards; of speech, patches in time of a stretch that it is trained on."""
    columns: int = 6
    """Patches across; of speech, from low bands to high ones."""
    values: int = 192
    """Numbers of a patch: height x width x 3, or frames x bands."""
    window: int = 0
    """A patch sees others that are at most so many rows away; 0: all. With a window, what is
    learned of short stretches holds for recordings of any length."""
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """Levels of each digit of a code (FSQ, arXiv 2309.15505); their product is the codes."""
    encoder_layers: int = 4
    """Blocks of the encoder."""
    encoder_width: int = 128
    """Width of the encoder, a multiple of head_dim."""
    width: int = 160
    """Width of the detokeniser, a multiple of head_dim."""
    prelude_layers: int = 1
    """The detokeniser's blocks before its loop."""
    core_layers: int = 2
    """Its blocks inside the loop; a single one is too few (arXiv 2604.09168)."""
    coda_layers: int = 1
    """Its blocks after the loop."""
    max_loops: int = 4
    """The most loops that it is trained for."""
    bottleneck: int = 48
    """Width through which noisy patches enter the detokeniser (arXiv 2511.13720)."""
    head_dim: int = 32
    """Width of an attention head."""

    def __post_init__(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise UsageError(f"codec: {what}")

        for name, most in _MOST.items():
            least, value = 0 if name in _MAY_BE_0 else 1, getattr(self, name)
            need(least <= value <= most, f"{name} must lie between {least} and {most}, not {value}")
        levels = self.levels
        need(0 < len(levels) <= 16 and all(2 <= n <= 256 for n in levels),
             f"levels {levels}: give 1 to 16 numbers from 2 to 256, as 8,5,5,5")  # fmt: skip
        need(self.codes <= 1 << 20, f"levels {levels} make {self.codes:,} codes, over {1 << 20:,}")
        for name in ("encoder_width", "width"):
            need(getattr(self, name) % self.head_dim == 0,
                 f"{name} must be a multiple of head_dim ({self.head_dim})")  # fmt: skip
        need(self.head_dim % 2 == 0, "head_dim must be even for RoPE")
        need(self.kind in SHAPES, f"kind must be {' or '.join(SHAPES)}, not {self.kind!r}")
        if self.kind == "picture":
            need(self.side > 0, f"values {self.values}: a picture's patch has side x side x 3")
        else:
            need(MELS % self.columns == 0 and self.frames > 0,
                 f"values {self.values} in {self.columns} columns: a patch of speech has frames x "
                 f"({MELS} / columns) numbers, as 160 in 2 columns")  # fmt: skip

    @property
    def codes(self) -> int:
        """How many codes there are."""
        return math.prod(self.levels)

    @property
    def side(self) -> int:
        """Height and width of a picture's patch, pixels; 0 where values are no such patch's."""
        side = math.isqrt(self.values // 3)
        return side if 3 * side**2 == self.values else 0

    @property
    def frames(self) -> int:
        """Frames of a patch of speech; 0 where values are no such patch's."""
        frames, left = divmod(self.values * self.columns, MELS)
        return 0 if left else frames

    @property
    def bits(self) -> float:
        """Of one code."""
        return math.log2(self.codes)
