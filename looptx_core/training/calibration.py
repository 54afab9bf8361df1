"""Calibration of the confidence head's output on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from looptx_core.config.generation import ExitSettings
from looptx_core.training.evaluate import LoopEvaluation

_STEEPEST = math.e**2  # the largest slope of log-odds; the smallest is its inverse
_LEAST_GAIN = 1e-6  # nats; below this mean gain a loop counts as the last that helps


def calibrate(settings: ExitSettings, held_out: LoopEvaluation) -> ExitSettings:
    """The exit settings, with calibration fitted on these tokens at loops where they may stop."""
    first = min(settings.min_loops, len(held_out.token_loss)) - 1
    logit, top_odds, hit = (
        part[first:] for part in (held_out.logit, held_out.top_log_odds, held_out.hit)
    )
    temperature, confidence_offset = fit_confidence(logit, hit)
    slope, power, offset = fit_gain(held_out.gain, held_out.change, held_out.token_loss)
    return replace(
        settings,
        temperature=temperature,
        confidence_offset=confidence_offset,
        stated=fit_odds(hit, logit, top_odds),
        gain_slope=slope,
        gain_power=power,
        gain_offset=offset,
    )


def fit_confidence(logit: Tensor, hit: Tensor) -> tuple[float, float]:
    """`ExitSettings.temperature` and `confidence_offset`, by `fit_odds`.

    The offset corrects a model that is too sure of every token, as after many epochs on few tokens.
    logit, hit: any equal shapes.
    """
    _, slope = fit_odds(hit, logit)
    slope = min(max(slope, 1 / _STEEPEST), _STEEPEST)  # an uninformative head has slope 0
    (offset,) = fit_odds(hit, given=slope * logit)
    return 1 / slope, offset


def fit_odds(hit: Tensor, *odds: Tensor, given: Tensor | None = None) -> tuple[float, ...]:
    """Logistic regression of hits on log-odds (Platt, 1999).

    Returns an offset and a weight for each of `odds`. given: log-odds with the fixed weight 1.
    hit, odds, given: any equal shapes.
    """
    inputs = torch.stack([torch.ones_like(hit), *odds], -1).flatten(0, -2).double()
    scale = inputs.square().mean(0).sqrt().clamp(min=1e-6)
    start = 0.0 if given is None else given.flatten().double()

    def mean(odds: Tensor) -> tuple[Tensor, Tensor]:
        probability = torch.sigmoid(odds + start)
        return probability, probability * (1 - probability)

    # A little decay keeps the weights finite where hits and misses can be separated perfectly.
    weights = _regress(inputs / scale, hit.flatten().double(), mean, decay=1e-4)
    return tuple((weights / scale).tolist())


def fit_gain(gain: Tensor, change: Tensor, loss: Tensor) -> tuple[tuple[float, ...], ...]:
    """`ExitSettings.gain_slope`, `gain_power` and `gain_offset`: each for all loops but the last.

    Gains span orders of magnitude, and they are small where the state hardly changes any more. So
    the logarithm of the mean gain is fitted as linear in the head's prediction and in the logarithm
    of the change (Poisson pseudo-likelihood; Gourieroux et al., 1984). A normal prior on the
    standardised slopes, weighted by the variance of the loss drops, prevents fitting noise.

    gain, change, loss: (loops, tokens); gain and loss in nats, the change without a unit.
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
    inputs: Tensor, targets: Tensor, mean: Callable[[Tensor], tuple[Tensor, Tensor]], decay: float
) -> Tensor:
    """Weights (n,) of a generalised linear model, fitted by Newton's method.

    mean(inputs @ weights) approximates the targets, (samples,); the minimum is unique. inputs:
    (samples, n), whose first column is 1. mean: returns the mean and its derivative. decay: weight
    decay.
    """
    weights = torch.zeros(inputs.shape[1], dtype=torch.double)
    decays = decay * torch.eye(len(weights), dtype=torch.double)
    for _ in range(50):
        predicted, derivative = mean(inputs @ weights)
        gradient = inputs.T @ (predicted - targets) / len(inputs) + decays @ weights
        hessian = (inputs.T * derivative) @ inputs / len(inputs) + decays
        step = torch.linalg.solve(hessian, gradient)
        weights = weights - step * min(1.0, 2.0 / float(step.norm().clamp(min=1e-12)))
        if step.norm() < 1e-9:
            break
    return weights
