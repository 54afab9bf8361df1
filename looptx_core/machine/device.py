"""Where a model runs: this process's GPU, or the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Result = TypeVar("Result")


def best_device() -> torch.device:
    """The GPU of this process's own number, set up for work of changing shapes, or the CPU."""
    if torch.cuda.is_available():
        # cuDNN's attention plans anew for each number of rows, and those still in the loop change
        # at every step: 5.7 ms a layer, seen on an H200.
        torch.backends.cuda.enable_cudnn_sdp(False)
        number = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", number % torch.cuda.device_count())
    return torch.device("cpu")


def on_best_device(model: nn.Module, work: Callable[[], Result]) -> Result:
    """Do the work with the model there, or where it stands if the GPU's memory is too small."""
    home = next(model.parameters()).device
    try:
        model.to(best_device())
        return work()
    except torch.OutOfMemoryError:
        model.to(home)
        torch.cuda.empty_cache()
        return work()
    finally:
        model.to(home)
