"""A model that gets a memory after its training."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from looptx_core.errors import UsageError
from looptx_core.model.block import Block
from looptx_core.model.loop import LoopedTransformer


def with_memory(
    model: LoopedTransformer, kind: Literal["infini", "delta"], window: int, block: int
) -> LoopedTransformer:
    """The same weights, with a window of attention and a memory whose gates are nearly closed.

    Texts of up to `window` tokens get the same logits as before. Longer ones miss what is beyond
    the window, until the memory is trained.

    Raises `UsageError` for a model that has a memory, and for a window that is no multiple of
    `block`.
    """
    if model.config.has_memory:
        raise UsageError(f"the model has a memory, {model.config.memory}; leave `memory` out")
    weight = model.embedding.weight
    config = replace(model.config, memory=kind, memory_window=window, memory_block=block)
    made = LoopedTransformer(config)
    missing, unexpected = made.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(".memory." in name for name in missing)
    for layer in made.core:
        assert isinstance(layer, Block) and layer.attention.memory is not None
        layer.attention.memory.close()
    made.attend = model.attend
    return made.to(weight.device, weight.dtype).train(model.training)
