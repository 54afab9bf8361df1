"""A model as the registry found it: a folder, or an adapter on its base."""

from __future__ import annotations

import torch

from looptx_core.checkpoint.folder import LoadedModel, load_model
from looptx_core.checkpoint.registry import ResolvedModel


def load_resolved(
    found: ResolvedModel,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """The model, with its adapter where it has one. Arguments and errors as for `load_model`."""
    loaded = load_model(found.folder, device=device, dtype=dtype)
    if found.adapter is None:
        return loaded
    from looptx_core.finetuning.adapters import load_adapter  # PEFT takes seconds to import

    return load_adapter(loaded, found.adapter)
