"""Where a model runs: this process's GPU, or the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Result = TypeVar("Result")


def best_device() -> torch.device:
    """The GPU with this process's local rank, prepared for changing shapes, or the CPU."""
    if torch.cuda.is_available():
        # cuDNN's attention plans again for each number of rows, which changes at every loop: 5.7 ms
        # a layer on an H200.
        torch.backends.cuda.enable_cudnn_sdp(False)
        number = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", number % torch.cuda.device_count())
    return torch.device("cpu")


def on_best_device(model: nn.Module, work: Callable[[], Result]) -> Result:
    """Work with the model on the best device, or on its own if the GPU's memory is too small."""
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
