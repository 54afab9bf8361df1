"""A metric with its standard error, from what each line of a task scored."""

from __future__ import annotations

import math
from collections import defaultdict


class Tally:
    """Scores of a task's lines; the value is the mean over groups of each group's ratio.

    A ratio is the sum of scores by the sum of weights: right answers by answers, or bits by bytes.
    Without groups it is the plain ratio, the accuracy or the bits per byte of all lines.
    """

    def __init__(self) -> None:
        self._lines: list[dict[str, tuple[float, float]]] = []

    def add(self, *scores: tuple[str, float, float]) -> None:
        """One line's scores: group, score and weight of each; a line may have several."""
        sums: dict[str, tuple[float, float]] = {}
        for group, score, weight in scores:
            before = sums.get(group, (0.0, 0.0))
            sums[group] = before[0] + score, before[1] + weight
        self._lines.append(sums)

    @property
    def value(self) -> float:
        ratios = self._ratios()
        return sum(ratio for ratio, _ in ratios.values()) / len(ratios)

    @property
    def stderr(self) -> float | None:
        """Of the value, over lines as the independent samples; None for a single line.

        By linearisation (the delta method), so that answers of one line may depend on each other.
        For one answer a line it is the sample's sqrt(p (1 - p) / (n - 1)).
        """
        count, ratios = len(self._lines), self._ratios()
        if count < 2:
            return None
        squares = 0.0
        for line in self._lines:
            residual = 0.0
            for group, (score, weight) in line.items():
                ratio, total = ratios[group]
                residual += (score - ratio * weight) / total / len(ratios)
            squares += residual**2
        return math.sqrt(squares * count / (count - 1))

    def _ratios(self) -> dict[str, tuple[float, float]]:
        """By group: the ratio, and the sum of the weights."""
        scores: dict[str, float] = defaultdict(float)
        weights: dict[str, float] = defaultdict(float)
        for line in self._lines:
            for group, (score, weight) in line.items():
                scores[group] += score
                weights[group] += weight
        return {group: (scores[group] / weights[group], weights[group]) for group in scores}
