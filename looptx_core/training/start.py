"""Training that goes on with the weights of a model, which may get more media by it."""

from __future__ import annotations

import torch

from looptx_core.checkpoint.folder import LoadedModel
from looptx_core.errors import UsageError
from looptx_core.model.loop import LoopedTransformer

_TRUNK = ("embedding.", "prelude.", "injection.", "core.", "coda.", "norm.", "head.", "confidence.")


def copy_weights(model: LoopedTransformer, start: LoadedModel) -> list[str]:
    """Give a new model the weights of another; returns the names of those that it alone has.

    The new model may read further media, and have rows for codes after those of the text. Raises
    `UsageError` for any other difference of their shapes.
    """
    own, given = model.state_dict(), start.model.state_dict()
    places = {section.codec: section.first_code for section in model.config.written}
    for section in start.config.written:
        if places.get(section.codec) != section.first_code:
            raise UsageError(
                f"`init` {start.name}: its codes of {section.SECTION} would move in the "
                "vocabulary; a model learns to draw before it learns to speak"
            )
    for name in ("embedding.weight", "head.weight"):
        rows = len(given[name])
        if model.config.written and rows < len(own[name]):
            given[name] = torch.cat([given[name], own[name][rows:]])
    for name, weight in given.items():
        shape = tuple(own[name].shape) if name in own else None
        if shape != tuple(weight.shape):
            raise UsageError(
                f"`init` {start.name}: its {name} is {tuple(weight.shape)}, and the new model's "
                f"{shape or 'is missing'}; leave out the keys of model that change its shape"
            )
    new = sorted(own.keys() - given.keys())
    if trunk := [name for name in new if name.startswith(_TRUNK)]:
        raise UsageError(
            f"`init` {start.name}: has no {trunk[0]}; leave out the keys of model that change its "
            "shape"
        )
    model.load_state_dict(given, strict=False)
    return new
