"""torch.compile for training: a graph for each stage of the forward pass, not for each block.

A loop is then one graph, within which norms, gates and casts are fused. The first graphs are for
static shapes; if depths are drawn, the number of rows that still loop becomes dynamic at its first
change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from looptx_core.model.loop import LoopedTransformer

_PARTS = ("embed", "step", "coda_hidden", "score")


def compile_forward(model: LoopedTransformer, backend: str = "inductor") -> None:
    """Compile the stages of the model's forward pass, at their first use with gradients."""
    # Graphs differ with and without documents, for all, some and one row, and by a loop's adapter.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    # Sizes of media differ from batch to batch, and each would need a graph of its own.
    for name in _PARTS[1:] if model.encoders() else _PARTS:
        setattr(model, name, _CompiledWithGradients(getattr(model, name), backend))


def uncompile_forward(model: LoopedTransformer) -> None:
    """Undo `compile_forward`."""
    for name in _PARTS:
        if isinstance(vars(model).get(name), _CompiledWithGradients):
            delattr(model, name)


class _CompiledWithGradients:
    """A stage that is compiled if gradients are on, and plain without.

    Validation is a small part of a run and would need further graphs.
    """

    def __init__(self, stage: Callable[..., Any], backend: str) -> None:
        self.stage, self.compiled = stage, torch.compile(stage, backend=backend)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return (self.compiled if torch.is_grad_enabled() else self.stage)(*arguments, **named)
