"""The depths that training draws: log-normal Poisson, truncated (Huginn, arXiv 2502.05171)."""

from __future__ import annotations

import numpy as np

_SPREAD = 0.5  # sigma of the log-normal rate, Huginn's
_TRIES = 1000  # after these, the least depth: nearly all draws lie outside of the range


def sample_depth(rng: np.random.Generator, mean: float, low: int, high: int) -> int:
    """One depth from low to high; truncation by rejection keeps the distribution's shape."""
    for _ in range(_TRIES):
        rate = np.exp(rng.normal(np.log(mean) - _SPREAD**2 / 2, _SPREAD))
        depth = 1 + int(rng.poisson(max(rate - 1, 0)))
        if low <= depth <= high:
            return depth
    return low


def sample_depths(
    rng: np.random.Generator, number: int, mean: float, low: int, high: int
) -> np.ndarray:
    """`number` depths of the same distribution at once, (number,)."""
    found = np.empty(0, dtype=np.int64)
    for _ in range(_TRIES):
        if len(found) >= number:
            break
        rates = np.exp(rng.normal(np.log(mean) - _SPREAD**2 / 2, _SPREAD, number))
        drawn = 1 + rng.poisson(np.maximum(rates - 1, 0))
        found = np.concatenate([found, drawn[(low <= drawn) & (drawn <= high)]])
    return np.concatenate([found, np.full(number, low)])[:number]
