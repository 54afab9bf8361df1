"""A training that goes on with the weights of a model, which may get more media by it."""

from __future__ import annotations

from pathlib import Path

from looptx_core.checkpoint.folder import LoadedModel, load_model
from looptx_core.checkpoint.registry import resolve_model
from looptx_core.errors import UsageError
from looptx_core.model.loop import LoopedTransformer


def load_start(path: str | Path) -> LoadedModel:
    """The model of a run or of a folder, with weights of its own. Raises `DataError`."""
    return load_model(resolve_model(path, need=frozenset({"weights"})).folder)


def copy_weights(model: LoopedTransformer, start: LoadedModel) -> list[str]:
    """Give a new model the weights of another; returns the names of those that it alone has.

    Raises `UsageError` where a weight of the other model has no place, or another shape.
    """
    own, given = model.state_dict(), start.model.state_dict()
    for name, weight in given.items():
        shape = tuple(own[name].shape) if name in own else None
        if shape != tuple(weight.shape):
            raise UsageError(
                f"`init` {start.name}: its {name} is {tuple(weight.shape)}, and the new model's "
                f"{shape or 'is missing'}; leave out the keys of model that change its shape"
            )
    model.load_state_dict(given, strict=False)
    return sorted(own.keys() - given.keys())
