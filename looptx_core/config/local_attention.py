"""Layers that attend within a window, between layers that attend to the whole text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from looptx_core.errors import UsageError


@dataclass(frozen=True)
class LocalAttention:
    """Which layers are local, and what they have of their own, as in Gemma 3 (arXiv 2503.19786).

    Layers are counted through prelude, core and coda, and keep their kind in every loop. Raises
    `UsageError` for values that fit no model.
    """

    window: int = 0
    """Tokens that a local layer attends to, the current one included; 0: no layer is local."""
    every: int = 6
    """Layers number `every`, 2 `every`, ... attend to the whole text, and all others are local;
    0: all layers are local."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies of local layers, which are not scaled."""

    def __post_init__(self) -> None:
        for name, most in (("window", 1 << 31), ("every", 10_000)):
            if not 0 <= getattr(self, name) <= most:
                raise UsageError(
                    f"model configuration: local_attention.{name} must lie between 0 and "
                    f"{most:,}, not {getattr(self, name)}"
                )
        if not 0 < self.rope_theta < math.inf:
            raise UsageError(
                "model configuration: local_attention.rope_theta must be above 0, not "
                f"{self.rope_theta}"
            )

    def has(self, layer: int) -> bool:
        """Whether a layer, counted from 0, is local."""
        return self.window > 0 and (self.every == 0 or (layer + 1) % self.every > 0)
