"""DeepSpeed's settings for ZeRO, and a user's own merged over them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from looptx_core.errors import UsageError
from looptx_core.parallel.deepspeed.checkpoint import MOMENTS
from looptx_core.parallel.memory import SPARE_BUFFERS

# What looptx sets by parameters of its own.
_OURS = {
    "optimizer": "`lr` and the like",
    "scheduler": "`warmup` and `min_lr`",
    "train_batch_size": "`batch_size`",
    "train_micro_batch_size_per_gpu": "`micro_batch`",
    "gradient_accumulation_steps": "`micro_batch`",
    "gradient_clipping": "`clip`",
    "checkpoint": "looptx itself",
}
_SUB_GROUPS = 8
_BLOCK = 1 << 20  # bytes; smaller tensors are never swapped


def settings(
    stage: int,
    *,
    rows: int,
    clip: float,
    parameters: int,
    largest: int,
    looped: int,
    world_size: int,
    on_gpu: bool,
    optimizer_to: str = "none",
    weights_to: str = "none",
    swap: Path | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    parameters: elements of all trained weights. largest: of the largest one of a block, which
    swap; what is larger, as an embedding, stays in RAM. looped: matrices in the core.
    optimizer_to, weights_to: 'none', 'cpu' or 'nvme'.
    """
    shard = math.ceil(parameters / world_size)
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,
        "reduce_scatter": True,
        # A group is updated at once, so it is what the swapped optimizer needs in memory.
        "sub_group_size": max(1 << 20, shard // _SUB_GROUPS),
        # Release weights after their use: the default keeps what comes again within 10^9 others,
        # which are all weights of smaller models.
        "stage3_max_reuse_distance": 0,
    }
    place = {"nvme_path": str(swap)} if swap else {}
    if optimizer_to != "none":
        zero["offload_optimizer"] = {
            "device": optimizer_to, "pin_memory": on_gpu,
            "buffer_count": 2 + len(MOMENTS) + 1, **place,
        }  # fmt: skip
    if weights_to != "none" and stage == 3:
        zero["offload_param"] = {
            "device": weights_to, "pin_memory": on_gpu,
            # In the backward pass DeepSpeed lets a weight go after its last use, so that of the
            # looped ones each has a buffer.
            "buffer_count": looped + SPARE_BUFFERS,
            "buffer_size": math.ceil(largest / world_size) + 1024,
            "max_in_cpu": 0, **place,
        }  # fmt: skip
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW is as exact on the CPU, and nothing need be compiled.
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_clipping": clip,
        "aio": {"block_size": _BLOCK, "queue_depth": 8, "intra_op_parallelism": 1,
                "single_submit": False, "overlap_events": True},
    }  # fmt: skip


def override(config: dict[str, Any], own: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The settings with a user's own over them. Raises `UsageError` for what a parameter sets."""
    for key in own:
        if key in _OURS:
            raise UsageError(f"{file}: {key} is set by {_OURS[key]}; remove it from the file")
    return _merge(config, own)


def _merge(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in own.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merge(old, value)
        merged[key] = value
    return merged
