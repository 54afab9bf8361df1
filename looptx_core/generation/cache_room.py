"""Caches that are made only where the memory holds them."""

from __future__ import annotations

import torch

from looptx_core.config.generation import ExitSettings
from looptx_core.errors import UsageError
from looptx_core.machine.facts import free_ram
from looptx_core.model.cache import LoopCache
from looptx_core.model.loop import LoopedTransformer


def fitting_cache(
    model: LoopedTransformer, rows: int, columns: int, loops: int, settings: ExitSettings
) -> LoopCache:
    """An empty cache: texts at once, tokens of each, and the most loops of a token.

    Raises `UsageError`, before anything is allocated, where it takes more memory than is free.
    """
    needed = cache_bytes(model, rows, columns, loops, settings)
    free = free_memory(model.norm.weight.device)
    if needed > free:
        texts = f"{rows} texts" if rows > 1 else "a text"
        raise UsageError(
            f"{texts} of {columns:,} tokens with up to {loops:,} loops each needs a cache of "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; ask for fewer tokens, "
            "loops or texts at once"
        )
    return model.new_cache(rows, columns, loops, settings.kv_policy, settings.kv_type)


def cache_bytes(
    model: LoopedTransformer, rows: int, columns: int, loops: int, settings: ExitSettings
) -> int:
    """The bytes of such a cache."""
    one = model.new_cache(1, 1, loops, settings.kv_policy, settings.kv_type)
    # A memory has one size, a cache of keys and values grows by the token.
    return rows * (one.nbytes + (columns - 1) * one.bytes_per_token)


def free_memory(device: torch.device) -> int:
    """The bytes that can still be had where a device keeps its tensors."""
    if device.type != "cuda":
        return free_ram()
    # PyTorch keeps the memory of tensors that are gone and gives it to the next ones.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
