"""The weights that a new model begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from looptx_core.media.encoder import Encoder
from looptx_core.model.memory import LayerMemory
from looptx_core.model.weights import draw_weights

if TYPE_CHECKING:
    from looptx_core.model.loop import LoopedTransformer


def initialise(model: LoopedTransformer) -> None:
    """Draw the weights of a new model.

    The depth counts the blocks of a pass of half the maximal loops, so that a learning rate
    carries over between loop counts (arXiv 2606.18524 scales the branches themselves).
    """
    depth = model.config.effective_layers((1 + model.config.max_loops) // 2)
    draw_weights(model.named_parameters(), depth)
    for encoder in model.encoders().values():
        if isinstance(encoder, Encoder):
            encoder.reset_stem()
    for module in model.modules():
        if isinstance(module, LayerMemory):  # drawn as matrices, its rates would forget at once
            module.reset()
    # The halting bias starts low, so that an untrained head is unsure (ACT, arXiv 1603.08983).
    nn.init.zeros_(model.confidence.hidden.bias)
    nn.init.ones_(model.confidence.gate.bias)
    with torch.no_grad():
        model.confidence.out.bias.zero_()[0] = -3.0
        model.confidence.gain.bias.zero_()
    model.injection.reset()
