"""Calibration: what the confidence head says, made true on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from looptx_core.config.generation import ExitSettings
from looptx_core.training.evaluate import LoopEvaluation

_LEAST_GAIN = 1e-6  # nats; of a loop after which nothing comes any more


def calibrate(settings: ExitSettings, held_out: LoopEvaluation) -> ExitSettings:
    """The exit settings with confidences and gains fitted on these tokens, where they may stop."""
    first = min(settings.min_loops, len(held_out.each)) - 1
    logit, sharp, hit = (part[first:] for part in (held_out.logit, held_out.sharp, held_out.hit))
    slope, power, offset = fit_gain(held_out.gain, held_out.change, held_out.each)
    return replace(
        settings,
        temperature=fit_temperature(logit, hit),
        stated=fit_stated(logit, sharp, hit),
        gain_slope=slope,
        gain_power=power,
        gain_offset=offset,
    )


def fit_temperature(logit: Tensor, hit: Tensor) -> float:
    """The temperature that minimises the cross-entropy of sigmoid(logit / T) against hits.

    Temperature scaling (Guo et al., arXiv 1706.04599), by golden-section search on log T, along
    which the cross-entropy has one minimum. logit, hit: any equal shapes.
    """

    def cost(log_t: float) -> float:
        scaled = logit.double() / torch.tensor(log_t).exp()
        return float(F.binary_cross_entropy_with_logits(scaled, hit.double()))

    low, high, golden = -2.0, 2.0, (5**0.5 - 1) / 2
    for _ in range(30):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if cost(left) < cost(right):
            high = right
        else:
            low = left
    return float(torch.tensor((low + high) / 2).exp())


def fit_stated(logit: Tensor, sharp: Tensor, hit: Tensor) -> tuple[float, ...]:
    """`ExitSettings.stated`: logistic regression of hits on both log-odds (Platt, 1999).

    logit, sharp, hit: any equal shapes.
    """
    inputs = torch.stack([torch.ones_like(logit), logit, sharp], -1).flatten(0, -2).double()
    scale = inputs.square().mean(0).sqrt().clamp(min=1e-6)

    def chance(odds: Tensor) -> tuple[Tensor, Tensor]:
        sure = torch.sigmoid(odds)
        return sure, sure * (1 - sure)

    # A trace of decay keeps the weights finite where hits can be told without an error.
    weights = _regress(inputs / scale, hit.flatten().double(), chance, decay=1e-4)
    return tuple((weights / scale).tolist())


def fit_gain(gain: Tensor, change: Tensor, loss: Tensor) -> tuple[tuple[float, ...], ...]:
    """`ExitSettings.gain_slope`, `gain_power` and `gain_offset`, each a number for each loop but
    the last.

    What a loop brings spreads over decades, and where little is to come the state has all but
    stopped: its mean is fitted by its logarithm, as linear in the prediction and in the change's
    logarithm (Poisson regression without its distribution; Gourieroux et al., 1984). A normal prior
    of one standard deviation, weighed by the drops' own spread, keeps noise from being read.
    gain, change, loss: (loops, tokens); nats, nothing, nats.
    """
    found = []
    drops = (loss[:-1] - loss[1:]).double()
    for drop, *both in zip(drops, gain.double(), change.double().log()):
        mean = float(drop.mean())
        if mean < _LEAST_GAIN:
            found.append((0.0, 0.0, math.log(_LEAST_GAIN)))
            continue
        middle = torch.stack([part.mean() for part in both])
        spread = torch.stack([part.std(correction=0) for part in both]).clamp(min=1e-6)
        inputs = torch.stack([torch.ones_like(drop), *both], 1)
        inputs[:, 1:] = (inputs[:, 1:] - middle) / spread
        decay = float((drop / mean).var(correction=0)) / len(drop)
        weights = _regress(inputs, drop / mean, lambda x: (x.exp(), x.exp()), decay)
        slopes = weights[1:] / spread
        found.append((*slopes.tolist(), math.log(mean) + float(weights[0] - slopes @ middle)))
    return tuple(zip(*found)) if found else ((), (), ())


def _regress(
    inputs: Tensor, wanted: Tensor, mean: Callable[[Tensor], tuple[Tensor, Tensor]], decay: float
) -> Tensor:
    """Weights (n,) by which mean(inputs @ weights) is nearest what is wanted.

    A generalised linear model by Newton's method; there is one minimum. inputs: (samples, n), the
    first of them 1. mean: with its derivative. decay: of the weights.
    """
    weights = torch.zeros(inputs.shape[1], dtype=torch.double)
    decays = decay * torch.eye(len(weights), dtype=torch.double)
    for _ in range(50):
        seen, grows = mean(inputs @ weights)
        slope = inputs.T @ (seen - wanted) / len(inputs) + decays @ weights
        curve = (inputs.T * grows) @ inputs / len(inputs) + decays
        step = torch.linalg.solve(curve, slope)
        weights = weights - step * min(1.0, 2.0 / float(step.norm().clamp(min=1e-12)))
        if step.norm() < 1e-9:
            break
    return weights
