"""What a run will take, before it starts: parameters, FLOPs, memory."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.model.flops import parameter_count, token_flops


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, costs in FLOPs."""

    parameters: int
    flops_per_token: dict[int, float]
    """Forward, by loops, read out once at the end, at half the sequence's length of context."""
    bytes: dict[str, int]
    total: int
    available: int
    device: str
    fits: bool
    advice: str


def plan(model: ModelConfig, config: TrainConfig) -> Plan:
    """Count a run's needs in float32 weights and AdamW, and compare with this machine."""
    parameters = parameter_count(model)
    max_loops = config.max_loops or model.max_loops
    cost = token_flops(model, config.seq_len / 2)
    sizes = _sizes(model, config, parameters, max_loops)
    total = sum(sizes.values())
    available, device = _memory()
    fits = total < available
    return Plan(
        parameters=parameters,
        flops_per_token={loops: cost.at(loops) for loops in sorted({1, 2, 4, max_loops})},
        bytes=sizes,
        total=total,
        available=available,
        device=device,
        fits=fits,
        advice="" if fits else _advice(model, config, parameters, max_loops, available),
    )


def _sizes(
    model: ModelConfig, config: TrainConfig, parameters: int, max_loops: int
) -> dict[str, int]:
    rows = config.micro_batch or config.batch_size
    tokens = rows * config.seq_len
    # Kept for the backward pass by one block, in units of a token: its norms, projections,
    # rotated heads, GeGLU, and residuals; measured to hold within a few percent.
    heads = (model.n_heads + 2 * model.n_kv_heads) * model.head_dim
    block = 4 * (8 * model.d_model + 5 * heads + 4 * model.d_ff)
    mean = max_loops if config.loop_schedule == "fixed" else min(config.mean_loops, max_loops)
    readouts = {"last": 1.0, "pair": 2.0, "all": mean}[config.loss_at]
    if config.grad_checkpointing:
        core = mean * 4 * model.d_model + model.core_layers * block
    else:
        core = mean * model.core_layers * block
    ends = model.prelude_layers * block + readouts * model.coda_layers * block
    vocabulary = readouts * 4 * 3 * model.vocab_size  # logits, their softmax and its gradient
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
        "activations": int(tokens * (core + ends + vocabulary)),
    }


def _advice(
    model: ModelConfig, config: TrainConfig, parameters: int, max_loops: int, available: int
) -> str:
    """The first flags that would make it fit, tried in the order of what they cost."""
    trials: list[tuple[str, TrainConfig]] = [
        ("--grad-checkpointing", replace(config, grad_checkpointing=True))
    ]
    micro = config.batch_size
    while micro > 1:
        micro //= 2
        if config.batch_size % micro == 0:
            trials.append((
                f"--grad-checkpointing --micro-batch {micro}",
                replace(config, grad_checkpointing=True, micro_batch=micro),
            ))  # fmt: skip
    for flags, trial in trials:
        if sum(_sizes(model, trial, parameters, max_loops).values()) < available:
            return f"Pass {flags}."
    return "Its weights and optimizer alone are too large here; take a smaller --preset."


def _memory() -> tuple[int, str]:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "RAM"
