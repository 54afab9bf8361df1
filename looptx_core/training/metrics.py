"""Measures of a confidence: calibration error, discrimination, rank correlation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BINS = 15


class Bin(NamedTuple):
    """Tokens of similar confidence."""

    confidence: float
    accuracy: float
    tokens: int


def reliability(probability: Tensor, hit: Tensor, bins: int = BINS) -> list[Bin]:
    """Mean confidence and accuracy in bins of equal mass, from unsure to sure.

    probability, hit: any equal shapes. Fewer tokens than bins make fewer bins.
    """
    probability, hit = probability.flatten(), hit.flatten()
    order = probability.argsort(stable=True)
    parts = order.tensor_split(min(bins, len(order)))
    return [
        Bin(float(probability[p].double().mean()), float(hit[p].double().mean()), len(p))
        for p in parts
    ]


def calibration_error(probability: Tensor, hit: Tensor, bins: int = BINS) -> float:
    """Mean |confidence - accuracy| over tokens, by bins of equal mass (arXiv 1909.10155)."""
    found = reliability(probability, hit, bins)
    off = sum(bin.tokens * abs(bin.confidence - bin.accuracy) for bin in found)
    return off / sum(bin.tokens for bin in found)


def auroc(score: Tensor, hit: Tensor) -> float | None:
    """The chance that a hit scores above a miss, ties half; None where one of them is missing.

    score, hit: (tokens,).
    """
    hits = float(hit.double().sum())
    misses = len(hit) - hits
    if not hits or not misses:
        return None
    ranks = _ranks(score)[hit.bool()].sum()
    return float((ranks - hits * (hits + 1) / 2) / (hits * misses))


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Correlation of ranks, ties at their mean rank; None where one side is constant. (n,) each."""
    a, b = _ranks(a), _ranks(b)
    a, b = a - a.mean(), b - b.mean()
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / scale if scale else None


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 1 up, ties sharing their mean; (n,) float64."""
    _, group, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group]
