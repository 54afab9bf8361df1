"""What a finetuning will take, before it starts: parameters, memory, time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from looptx_core.config.finetune import FinetuneConfig
from looptx_core.finetuning.run import Prepared
from looptx_core.machine.facts import this_machine
from looptx_core.model.loop import LoopedTransformer
from looptx_core.parallel.memory import (
    Activations,
    MemoryEstimate,
    ParallelLayout,
    count_activations,
    rank_need,
)
from looptx_core.training.frozen import cast_bytes
from looptx_core.training.step_time import TimeEstimate, estimate_time
from looptx_core.training.trial import time_steps


@dataclass(frozen=True)
class FinetunePlan:
    """Sizes in bytes, of one process."""

    method: str
    parameters: int
    """Of the base's trunk."""
    trainable: int
    """Those of them that are trained; the confidence head's come on top."""
    examples: int
    """Those to train on."""
    held_out: int
    steps: int
    epochs: float
    need: MemoryEstimate
    time: TimeEstimate | None
    """None where several processes share the work."""

    def to_dict(self) -> dict[str, Any]:
        """For `looptx finetune --dry-run --json`."""
        told = ("method", "parameters", "trainable", "examples", "held_out", "steps", "epochs")
        return {
            **{name: getattr(self, name) for name in told},
            "bytes": self.need.to_dict(),
            "total": self.need.total,
            "seconds_per_step": self.time and self.time.seconds_per_step,
            "seconds": self.time and self.time.seconds,
        }


def plan_finetune(prepared: Prepared) -> FinetunePlan:
    """Count what a prepared run needs, and time two of its steps, by which its model is changed."""
    config, batches = prepared.config, prepared.batches
    return FinetunePlan(
        method=config.method,
        parameters=prepared.parameters,
        trainable=prepared.trainable,
        examples=len(batches.train.examples),
        held_out=len(batches.val.examples),
        steps=config.steps,
        epochs=config.steps * config.batch_size / len(batches.train),
        need=_need(prepared),
        time=estimate_time(
            prepared.base.config, config, lambda: time_steps(prepared.base.model, batches, config)
        ),
    )


def _need(prepared: Prepared) -> MemoryEstimate:
    config, shape = prepared.config, prepared.base.config
    machine = this_machine(".")
    bf16 = config.precision == "bf16" or (config.precision == "auto" and bool(machine.gpu_memory))
    rows = config.micro_batch_size
    if not config.adapts:
        layout = ParallelLayout.of(config)
        return rank_need(shape, config, layout, rows, bf16, heap=not machine.gpu_memory)
    model = prepared.base.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cast = cast_bytes(model, torch.bfloat16) if bf16 and config.sharding == "none" else 0
    return MemoryEstimate(
        weights=prepared.base_bytes + cast + 4 * prepared.trainable,
        masters=0,
        moments=8 * trained,
        gradients=4 * trained,
        buffers=0,
        activations=_kept(model, config, count_activations(shape, config, rows, bf16)),
        overlap=0,
    )


def _kept(model: LoopedTransformer, config: FinetuneConfig, all_of_it: Activations) -> int:
    """Bytes of the activations: nothing is kept up to the first part that is trained."""
    before = (model.embedding, *model.encoders().values(), model.prelude)
    if any(p.requires_grad for part in before for p in part.parameters()):
        return all_of_it.total
    untrained = all_of_it.loops[0] if config.lora_layers == "later" else 0
    return all_of_it.total - all_of_it.prelude - untrained
