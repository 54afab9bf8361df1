"""How RoPE's frequencies are lowered, for models that were trained on to longer texts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from looptx_core.errors import UsageError

ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """Scaled RoPE, with the names that transformers has. Raises `UsageError` for values that fit
    no model."""

    rope_type: Literal["default", "linear", "llama3"] = "default"
    """default: frequencies as they are. linear: all divided by the factor. llama3: the low ones
    divided, the high ones kept, and a ramp between them."""
    factor: float = 1.0
    """By which frequencies are divided."""
    low_freq_factor: float = 1.0
    """llama3: a wave longer than the original context over this is divided by the whole factor."""
    high_freq_factor: float = 4.0
    """llama3: a wave shorter than the original context over this is kept."""
    original_max_position_embeddings: int = 8192
    """llama3: the context that the model was first trained for, tokens."""

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise UsageError(
                f"model configuration: rope_scaling.rope_type must be {', '.join(ROPE_TYPES[:-1])} "
                f"or {ROPE_TYPES[-1]}, not {self.rope_type!r}"
            )
        if not 1 <= self.factor < math.inf:
            raise UsageError(
                f"model configuration: rope_scaling.factor must be at least 1, not {self.factor}"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise UsageError(
                "model configuration: rope_scaling.low_freq_factor must be above 0 and below "
                f"high_freq_factor, not {self.low_freq_factor} and {self.high_freq_factor}"
            )
        if not 1 <= self.original_max_position_embeddings <= 1 << 31:
            raise UsageError(
                "model configuration: rope_scaling.original_max_position_embeddings must lie "
                f"between 1 and {1 << 31}, not {self.original_max_position_embeddings}"
            )
