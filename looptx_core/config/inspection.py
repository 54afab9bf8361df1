"""What `looptx inspect-loops` looks at."""

from __future__ import annotations

from dataclasses import dataclass

from looptx_core.config.ranges import check_ranges
from looptx_core.errors import UsageError

MEDIA_PATHS = ("image", "audio", "video")
"""The settings that name files of media."""

BRIEF = {"val_batches": 2, "decode_tokens": 0}
"""What is measured of held-out data where the user looks at a text or an item: it takes seconds,
and suffices to calibrate."""


@dataclass(frozen=True)
class InspectConfig:
    """Settings of an inspection, after merging."""

    data: tuple[str, ...] = ()
    """Tokenised shards or raw text, whose held-out part is measured; absent: the run's own."""
    out: str | None = None
    """The report's folder; absent: runs/inspect-loops-<n>."""
    seq_len: int = 128
    """Tokens a sequence."""
    batch_size: int = 32
    """Sequences a pass."""
    val_batches: int = 16
    """Passes; half of the sequences calibrate, the other half are reported on. Where a text or an
    item of media is to be seen, and nothing else is asked for: 2."""
    max_loops: int | None = None
    """The deepest loop to look at; absent: the model's maximum."""
    calibrate: bool = False
    """Write the calibration of confidence and gains into the model folder."""
    target_loss_increase: str | None = None
    """Pick the exit that saves the most within this, as 0.5%, and make it the model's own."""
    text: str | None = None
    """Trace this text token by token."""
    prompt: str | None = None
    """Trace this prompt and what the model makes of it, a picture or speech too where it can."""
    image: tuple[str, ...] = ()
    """Map how far the loops move the patches of this picture."""
    audio: tuple[str, ...] = ()
    """Map how far the loops move each moment of this recording."""
    video: tuple[str, ...] = ()
    """Map how far the loops move each step of time of this clip."""
    max_new_tokens: int = 40
    """prompt: tokens to generate."""
    decode_tokens: int = 1920
    """Tokens decoded one by one for each cache policy, with exits and at fixed depths; 0: none, as
    where a text or an item of media is to be seen."""
    seed: int = 0
    """Seed of the deletion test's random tokens."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.text is not None and self.prompt is not None:
            raise UsageError("`text` and `prompt`: give one of them")
        _ = self.allowed_increase

    @property
    def media(self) -> dict[str, tuple[str, ...]]:
        """Files to look at, by medium."""
        return {name: files for name in MEDIA_PATHS if (files := getattr(self, name))}

    @property
    def allowed_increase(self) -> float | None:
        """`target_loss_increase` as a share."""
        if self.target_loss_increase is None:
            return None
        number, percent, _ = self.target_loss_increase.partition("%")
        try:
            share = float(number) / (100 if percent else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise UsageError(
                f"`target_loss_increase` {self.target_loss_increase}: give a share such as 0.5%"
            )
        return share
