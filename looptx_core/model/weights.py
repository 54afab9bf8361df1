"""The distribution that new weights are drawn from, and the type that they compute in."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

INIT_STD = 0.02
"""Standard deviation of new matrices."""


def draw_weights(parameters: Iterable[tuple[str, nn.Parameter]], depth: int) -> None:
    """Draw matrices from a normal distribution of standard deviation `INIT_STD`.

    The projections that end a residual branch get GPT-2's smaller one, over sqrt(2 * depth).
    """
    for name, parameter in parameters:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * depth))
        elif parameter.dim() >= 2:
            nn.init.normal_(parameter, std=INIT_STD)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The type of the activations: autocast's if that is on, else the weights'."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
