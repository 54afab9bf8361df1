"""Calibration of the confidence head's output, with parameters that are stored with the model.

Every function takes the numbers of one token or tensors for many, and keeps their shape.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from looptx_core.config.generation import ExitSettings

Numbers = TypeVar("Numbers", Tensor, float)

MAX_LOG_GAIN = 10.0
"""Upper bound of the logarithm of a predicted gain in nats, as in the kernel in `backends/cpu`."""
_MIN_ODDS = -500.0  # `math.exp` overflows above 709


def calibrated(
    logit: Numbers, gain: Numbers, change: Numbers, loop: int, settings: ExitSettings
) -> tuple[Numbers, Numbers]:
    """Calibrate the head's output after a loop.

    logit, gain: the head's. change: the state's, `looptx_core.model.confidence.relative_change`.
    loop: counted from 1. Returns the probability that the top token is right, and the nats that
    the next loop is predicted to gain.
    """
    if settings.gain_slope:
        index = min(loop, len(settings.gain_slope)) - 1
        slope, power, offset = (
            part[index] for part in (settings.gain_slope, settings.gain_power, settings.gain_offset)
        )
        gain = _exp(offset + slope * gain + power * _log(change))
    return _probability(_calibrated_odds(logit, settings)), gain


def reported_confidence(logit: Numbers, top_logit: Numbers, settings: ExitSettings) -> Numbers:
    """The probability, reported with each token, that the most likely token is right.

    logit: the confidence head's. top_logit: `looptx_core.model.confidence.top_log_odds` of the
    logits. The head sees how the state changes, and the logits show how close the other tokens
    are; both together separate hits from misses better than either alone.
    """
    if not settings.stated:
        return _probability(_calibrated_odds(logit, settings))
    offset, head, readout = settings.stated
    return _probability(offset + head * logit + readout * top_logit)


def _calibrated_odds(logit: Numbers, settings: ExitSettings) -> Numbers:
    return logit / settings.temperature + settings.confidence_offset


def _exp(x: Numbers) -> Numbers:
    if isinstance(x, Tensor):
        return x.clamp(max=MAX_LOG_GAIN).exp()
    return math.exp(min(x, MAX_LOG_GAIN))


def _log(x: Numbers) -> Numbers:
    return x.log() if isinstance(x, Tensor) else math.log(x)


def _probability(odds: Numbers) -> Numbers:
    if isinstance(odds, Tensor):
        return torch.sigmoid(odds)
    return 1 / (1 + math.exp(-max(odds, _MIN_ODDS)))
