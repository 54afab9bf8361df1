"""Where a model runs: this process's GPU, or the CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import nn


def best_device() -> torch.device:
    """The GPU of this process's own number, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


@contextlib.contextmanager
def on_best_device(model: nn.Module) -> Iterator[None]:
    """The model stands there for a while, and then where it stood."""
    home = next(model.parameters()).device
    model.to(best_device())
    try:
        yield
    finally:
        model.to(home)
