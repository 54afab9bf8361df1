"""Optimizers, schedules of the learning rate, and clipping by part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from looptx_core.config.run import RunConfig
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.hardware import choose_precision
from looptx_core.training.muon import Muon

_GATE_LR = 0.01
"""The least learning rate of a memory's own parameters. At those of large models its gates stay
where they start, and the memory is never used."""


def memory_parameters(model: LoopedTransformer) -> list[torch.nn.Parameter]:
    """The trained parameters of the core's memories, which don't decay."""
    return [p for name, p in model.named_parameters() if ".memory." in name and p.requires_grad]


class ChainedOptimizer(torch.optim.Optimizer):
    """Several optimizers as one, for a trainer that steps a single one.

    Each keeps its own parameters and state; schedulers see the groups of all.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def build_optimizer(model: LoopedTransformer, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon for the blocks' matrices with AdamW for the rest.

    Muon's steps have AdamW's size, so that one learning rate serves both; its products run in the
    type that this machine multiplies fastest. Weights decay on matrices only.
    """
    memories = memory_parameters(model)
    apart = {id(p) for p in memories}
    blocks = [model.prelude, model.core, model.coda, *model.encoders().values()]
    muon_takes = [p for part in blocks for p in part.parameters()
                  if p.dim() == 2 and id(p) not in apart]  # fmt: skip
    return split_optimizer(
        [p for p in model.parameters() if id(p) not in apart],
        muon_takes if config.optimizer == "muon" else (),
        memories=memories,
        lr=config.lr,
        weight_decay=config.weight_decay,
        beta2=config.beta2,
    )


def split_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    muon_takes: Iterable[torch.nn.Parameter],
    *,
    memories: Sequence[torch.Tensor] = (),
    lr: float,
    weight_decay: float,
    beta2: float,
) -> torch.optim.Optimizer:
    """Muon for the matrices in `muon_takes`, AdamW for the other parameters that are trained.

    memories: what AdamW steps without decay and at a learning rate of its own.
    """
    trained = [p for p in parameters if p.requires_grad]
    wanted = {id(p) for p in muon_takes}
    chosen = [p for p in trained if id(p) in wanted]
    rest = [p for p in trained if id(p) not in wanted]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    if memories:
        groups.append({"params": memories, "weight_decay": 0.0, "lr": max(lr, _GATE_LR)})
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)
    if not chosen:
        return adamw
    precision, _ = choose_precision("auto", chosen[0].device)
    products = torch.bfloat16 if precision == "bf16" else torch.float32
    return ChainedOptimizer(
        Muon(chosen, lr=lr, weight_decay=weight_decay, products=products), adamw
    )


def build_adamw(model: LoopedTransformer, config: RunConfig) -> torch.optim.AdamW:
    """AdamW for sharded parameters, in groups of the `trunk` and of the confidence `head`.

    ZeRO shards at any element and FSDP by rows, so only elementwise updates are possible; Muon
    needs whole matrices.
    """
    head = {id(p) for p in model.confidence.parameters()}
    memories = memory_parameters(model)
    apart = {id(p) for p in memories}
    groups = []
    for part in ("trunk", "head"):
        mine = [p for p in model.parameters()
                if p.requires_grad and (id(p) in head) == (part == "head")
                and id(p) not in apart]  # fmt: skip
        for decays in (True, False):
            params = [p for p in mine if (len(shape_of(p)) >= 2) == decays]
            decay = config.weight_decay if decays else 0.0
            if params:
                groups.append({"params": params, "weight_decay": decay, "part": part})
    if memories:
        lr = max(config.lr, _GATE_LR)
        groups.append({"params": memories, "weight_decay": 0.0, "part": "trunk", "lr": lr})
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter, even if ZeRO has sharded it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def learning_rate_factor(config: RunConfig) -> Callable[[int], float]:
    """Step -> share of the peak: a linear warm-up, then what `lr_schedule` says.

    From step `config.steps` on it is the last value, for runs that continue beyond their steps.
    """
    warmup = max(1, round(config.warmup * config.steps))
    falls = config.steps - warmup
    if config.lr_schedule == "wsd":
        falls = min(falls, max(1, round(config.lr_decay * config.steps)))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.lr_schedule == "constant":
            return 1.0
        done = min(1.0, max(0.0, (step - (config.steps - falls)) / max(1, falls)))
        cosine = config.lr_schedule == "cosine"
        above = 0.5 * (1 + math.cos(math.pi * done)) if cosine else 1 - done
        return config.min_lr + (1 - config.min_lr) * above

    return factor


def clip_by_part(model: LoopedTransformer, limit: float) -> torch.Tensor:
    """Clip the gradients of trunk and confidence head separately; returns the trunk's norm.

    With a common norm, the head's gradient would scale the trunk's steps. limit: 0 for no clipping.
    """
    limit = limit or math.inf
    torch.nn.utils.clip_grad_norm_(model.confidence.parameters(), limit)
    norm = torch.nn.utils.clip_grad_norm_(model.trunk_parameters(), limit)
    # The norm of sharded gradients is partial until `full_tensor` reduces it.
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
