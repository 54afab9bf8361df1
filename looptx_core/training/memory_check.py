"""Whether the settings of a run train the memory of a model that has one."""

from __future__ import annotations

from collections.abc import Callable

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import RunConfig
from looptx_core.errors import UsageError


def check_memory_use(
    model: ModelConfig, config: RunConfig, report: Callable[[str], object]
) -> None:
    """Raise `UsageError` where a model with a memory can't be trained so, and report where its
    memory would not be trained."""
    if not model.has_memory:
        return
    if config.compile:
        raise UsageError("`compile` can't compile a model with a memory; leave it out")
    if config.sharding not in ("none", "ddp"):
        raise UsageError(
            f"a memory's weights are read between layers, and {config.sharding} gathers them layer "
            "by layer; pass `strategy` ddp"
        )
    if config.seq_len <= model.memory_window:
        report(
            f"memory: not trained, as sequences of {config.seq_len} tokens fit into its window; "
            f"give `seq_len` {8 * model.memory_block} or more"
        )
