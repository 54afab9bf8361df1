"""How long a run would take: by a few of its steps done for trial, where they are short."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import RunConfig
from looptx_core.machine.device import best_device
from looptx_core.model.flops import token_flops

_LONGEST = 10.0  # seconds of a step that is tried, by a guess from its FLOPs
_PROBE = 1024  # width of the matrix product that the guess rests on
_USED = 0.3  # of that product's rate, which a training step reaches


@dataclass(frozen=True)
class TimeEstimate:
    """How long a run would take, without its evaluations and saves."""

    steps: int
    seconds_per_step: float
    timed: bool
    """By steps that were done here; else by their FLOPs, which tells seconds from hours."""

    @property
    def seconds(self) -> float:
        return self.steps * self.seconds_per_step


def estimate_time(
    model: ModelConfig, config: RunConfig, time_step: Callable[[], float], fits: bool = True
) -> TimeEstimate | None:
    """Of a run from the start.

    time_step: does a few steps for trial and returns the seconds of one. fits: whether memory
    holds the run; else no step is tried, as for steps that are long by their FLOPs. None for
    several processes and for sharded weights, whose time depends on more than this process.
    """
    if config.sharding != "none":
        return None
    guess = _guess(model, config)
    if not fits or guess > _LONGEST:
        return TimeEstimate(config.steps, guess, timed=False)
    return TimeEstimate(config.steps, time_step(), timed=True)


def _guess(model: ModelConfig, config: RunConfig) -> float:
    """A step's seconds by its FLOPs and the rate of a product of matrices here."""
    ones = torch.ones(_PROBE, _PROBE, device=best_device())
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        (ones @ ones)[0, 0].item()  # which waits for the product
        seconds.append(time.perf_counter() - started)
    rate = 2 * _PROBE**3 / min(seconds)
    loops = min(config.mean_loops, config.max_loops or model.max_loops)
    forward = token_flops(model, config.seq_len / 2).at(loops)
    return 3 * forward * config.batch_size * config.seq_len / (rate * _USED)
