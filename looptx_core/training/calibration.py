"""Calibration: what the confidence head says, made true on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from looptx_core.config.generation import ExitSettings
from looptx_core.training.evaluate import LoopEvaluation

_STEEPEST = math.e**2  # a slope of log-odds, and its inverse the flattest
_LEAST_GAIN = 1e-6  # nats; of a loop after which nothing comes any more


def calibrate(settings: ExitSettings, held_out: LoopEvaluation) -> ExitSettings:
    """The exit settings with confidences and gains fitted on these tokens, where they may stop."""
    first = min(settings.min_loops, len(held_out.each)) - 1
    logit, sharp, hit = (part[first:] for part in (held_out.logit, held_out.sharp, held_out.hit))
    temperature, confidence_offset = fit_confidence(logit, hit)
    slope, power, offset = fit_gain(held_out.gain, held_out.change, held_out.each)
    return replace(
        settings,
        temperature=temperature,
        confidence_offset=confidence_offset,
        stated=fit_odds(hit, logit, sharp),
        gain_slope=slope,
        gain_power=power,
        gain_offset=offset,
    )


def fit_confidence(logit: Tensor, hit: Tensor) -> tuple[float, float]:
    """`ExitSettings.temperature` and `confidence_offset`, by `fit_odds`.

    The offset is for what a model believes of itself: after training on few tokens many times it is
    too sure of all. logit, hit: any equal shapes.
    """
    _, slope = fit_odds(hit, logit)
    slope = min(max(slope, 1 / _STEEPEST), _STEEPEST)  # a head that tells nothing has no slope
    (offset,) = fit_odds(hit, given=slope * logit)
    return 1 / slope, offset


def fit_odds(hit: Tensor, *odds: Tensor, given: Tensor | None = None) -> tuple[float, ...]:
    """Logistic regression of hits on log-odds (Platt, 1999): an offset, and a weight for each.

    hit, odds, given: any equal shapes; `given` is added as it is.
    """
    inputs = torch.stack([torch.ones_like(hit), *odds], -1).flatten(0, -2).double()
    scale = inputs.square().mean(0).sqrt().clamp(min=1e-6)
    start = 0.0 if given is None else given.flatten().double()

    def chance(odds: Tensor) -> tuple[Tensor, Tensor]:
        sure = torch.sigmoid(odds + start)
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
