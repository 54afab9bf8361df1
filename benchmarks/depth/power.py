"""What a loop is worth in layers: the power of the law of arXiv 2604.21106, at equal tokens.

    loss = E + A * (loops ** power * parameters of the looped blocks) ** -alpha

A power of 1 makes a loop as good as a layer of its own, 0 makes it worth nothing. Embeddings are
not counted, and blocks that run once are absent here. With equal tokens, the law's term for them is
part of E.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

POWERS = np.arange(-1.0, 2.0001, 0.02)
_ALPHAS = np.geomspace(0.02, 2.0, 15)


class Power(NamedTuple):
    """A fit, and the interval that holds 95 % of the fits to resampled residuals."""

    value: float
    low: float
    high: float
    residual: float
    """Root mean square, in the unit of the loss."""


def fit(loops: Sequence[int], parameters: Sequence[float], losses: Sequence[float]) -> Power:
    """The power by least squares over a grid, where more parameters lower the loss.

    Raises `ValueError` for fewer than four numbers of loops, or where nothing lowers the loss.
    """
    if len(set(loops)) < 4:
        raise ValueError("a power needs at least four numbers of loops")
    r, n, y = (np.asarray(part, dtype=float) for part in (loops, parameters, losses))
    apart = [r == one for one in set(loops)]
    if sum(np.log(n[of]) @ (y[of] - y[of].mean()) for of in apart) >= 0:
        raise ValueError("more parameters do not lower the loss")
    grid = [(power, alpha) for power in POWERS for alpha in _ALPHAS]
    terms = np.stack([(r**power * n / n.mean()) ** -alpha for power, alpha in grid])
    terms -= terms.mean(1, keepdims=True)
    squares = (terms**2).sum(1)

    def best(of: np.ndarray) -> np.ndarray:
        """Of each column of losses: the row of the grid that fits best."""
        slopes = terms @ (of - of.mean(0)) / squares[:, None]
        # What a regression leaves is all variance but slope^2 times the term's squares.
        explained = np.where(slopes > 0, slopes**2 * squares[:, None], -1.0)
        found: np.ndarray = explained.argmax(0)
        return found

    at = int(best(y[:, None])[0])
    slope = terms[at] @ (y - y.mean()) / squares[at]
    fitted = y.mean() + slope * terms[at]
    left = y - fitted
    left -= left.mean()
    drawn = np.random.default_rng(0).choice(left, (400, len(y))).T
    powers = np.array([grid[row][0] for row in best(fitted[:, None] + drawn)])
    low, high = np.quantile(powers, [0.025, 0.975])
    return Power(float(grid[at][0]), float(low), float(high), float(np.sqrt((left**2).mean())))
