"""What `looptx evaluate` measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from looptx_core.config.generation import ExitRule
from looptx_core.config.ranges import check_ranges
from looptx_core.errors import UsageError

Depth = int | Literal["auto"]
"""A fixed number of loops, or the exit rule for each token."""
DEPTHS = ("1", "2", "4", "auto")


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation, after merging."""

    tasks: tuple[str, ...] = ()
    """Names of tasks, separated by commas; absent: all of looptx's own."""
    loops: tuple[str, ...] = ()
    """Depths to compare, separated by commas, auto by the exit rule; absent: 1,2,4,auto."""
    limit: int | None = None
    """The first so many lines of each task; absent: all."""
    include_path: str | None = None
    """A folder with tasks of your own, as YAML."""
    out: str | None = None
    """Draw the metrics by depth to this .png, .svg or .pdf."""
    batch_size: int = 32
    """Lines that are scored at once."""
    exit: ExitRule | None = None
    """auto: the exit rule; absent: the model's own."""
    threshold: float | None = None
    """auto: the exit rule's threshold; absent: the model's own. With rule auto, the confidence's.
    """

    def __post_init__(self) -> None:
        check_ranges(self)
        _ = self.depths

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, each once, in the order in which they were given."""
        return _split(self.tasks)

    @property
    def depths(self) -> tuple[Depth, ...]:
        """Fixed depths in increasing order, then auto. Raises `UsageError`."""
        found: list[Depth] = []
        for text in _split(self.loops) or DEPTHS:
            if text == "auto":
                continue
            if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) < 10_000:
                raise UsageError(f"`loops` {text}: give depths such as 1,2,4,auto")
            found.append(int(text))
        found = sorted(set(found), key=int)
        return (*found, "auto") if "auto" in (_split(self.loops) or DEPTHS) else tuple(found)


def _split(given: tuple[str, ...]) -> tuple[str, ...]:
    parts = (part.strip() for text in given for part in text.split(","))
    return tuple(dict.fromkeys(part for part in parts if part))
