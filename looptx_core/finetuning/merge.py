"""Put an adapter into its base's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from looptx_core.checkpoint.card import descended
from looptx_core.checkpoint.folder import LoadedModel, load_model, model_name
from looptx_core.errors import UsageError
from looptx_core.finetuning.adapters import is_from_second, load_adapter, loops_of, own_facts
from looptx_core.model.loop import LoopedTransformer


def merge_adapter(base_folder: str | Path, adapter_folder: str | Path) -> LoopedTransformer:
    """The full-precision base with the adapter in its weights, in evaluation mode.

    An adapter that was trained on a quantised base merges onto the full-precision one: merging
    into nf4 would round the sum once more.

    Raises:
        UsageError: the adapter has a part for each loop, or none in the first, which one set of
            weights can't hold.
        DataError: a folder that is no model or no adapter, a pickle, or an adapter of another
            base.
    """
    return merge(base_folder, adapter_folder).model


def merge(base_folder: str | Path, adapter_folder: str | Path) -> LoadedModel:
    """`merge_adapter` with the tokenizer and the adapter's calibrated exit rule."""
    adapter = Path(adapter_folder)
    if loops := loops_of(adapter):
        raise UsageError(
            f"{adapter}: has an adapter for each of {loops} loops, and one set of weights serves "
            "all loops; run it by looptx generate --adapter, or train one without `lora_per_loop`"
        )
    if is_from_second(adapter):
        raise UsageError(
            f"{adapter}: acts from the second loop on, and one set of weights serves all loops; "
            "run it by looptx generate --adapter, or train one without `lora_layers` later"
        )
    base = load_model(base_folder, dtype=torch.float32)
    found = own_facts(adapter)
    told = {key: found[key] for key in ("data", "steps", "seed") if key in found}
    method = f"{found.get('method', 'LoRA')}, merged"
    facts = descended(base.facts, base.name, adapter=model_name(adapter), method=method, **told)
    return replace(load_adapter(base, adapter), facts=facts)
