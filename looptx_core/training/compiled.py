"""torch.compile for training: a graph for each move of the forward pass, not for each block.

A loop is then one call, whose norms, gates and casts are fused with each other and with those of
the loss. The first graphs are for the shapes that come; where depths are drawn, the number of rows
that are still in the loop becomes a symbol at its first change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from looptx_core.model.loop import LoopedTransformer

_PARTS = ("embed", "step", "coda_hidden", "score")


def compile_forward(model: LoopedTransformer, backend: str = "inductor") -> None:
    """From here on the model's moves are compiled, at their first use, where gradients are asked
    for."""
    # Batches with documents and without, all rows, some and one, loops with adapters of their own.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    # Items' sizes differ from batch to batch, and each would be a graph of its own.
    for name in _PARTS[1:] if model.encoders() else _PARTS:
        setattr(model, name, _WhereItLearns(getattr(model, name), backend))


def uncompile_forward(model: LoopedTransformer) -> None:
    """As they were."""
    for name in _PARTS:
        if isinstance(vars(model).get(name), _WhereItLearns):
            delattr(model, name)


class _WhereItLearns:
    """Validation is a small part of a run, and its graphs would be compiled beside training's."""

    def __init__(self, move: Callable[..., Any], backend: str) -> None:
        self.move, self.compiled = move, torch.compile(move, backend=backend)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return (self.compiled if torch.is_grad_enabled() else self.move)(*arguments, **named)
