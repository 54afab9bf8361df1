"""A run's length in passes over its data."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

from looptx_core.config.run import RunConfig
from looptx_core.words import counted

C = TypeVar("C", bound=RunConfig)


def in_steps(config: C, sequences: int) -> C:
    """The settings with the steps that `epochs` comes to; without `epochs` as they are.

    sequences: those to train on, of which one epoch sees each once. The last step is a whole one.
    """
    if config.epochs is None:
        return config
    # A product such as 3 x 0.1 must not become one step more by rounding.
    steps = math.ceil(config.epochs * sequences / config.batch_size - 1e-9)
    return replace(config, steps=max(1, steps))


def epochs_told(config: RunConfig, steps: int, sequences: int) -> str:
    """A line on how long a run is."""
    epochs = steps * config.batch_size / sequences
    return (
        f"epochs: {epochs:.3g}, {counted(steps, 'step')} with {config.batch_size:,} of the "
        f"{counted(sequences, 'sequence')} each"
    )
