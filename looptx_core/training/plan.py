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
    cache: int
    """Of one sequence of `max_seq_len` tokens at full depth, in generation; not in `total`."""
    available: int
    device: str
    fits: bool
    advice: str


def plan(model: ModelConfig, config: TrainConfig) -> Plan:
    """Count a run's needs in float32, and compare with this machine."""
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
        cache=2
        * 4
        * model.max_seq_len
        * model.effective_layers(max_loops)
        * model.n_kv_heads
        * model.head_dim,
        available=available,
        device=device,
        fits=fits,
        advice="" if fits else _advice(model, config, parameters, max_loops, available),
    )


def _sizes(
    model: ModelConfig, config: TrainConfig, parameters: int, max_loops: int
) -> dict[str, int]:
    rows = config.micro_batch or config.batch_size // config.devices
    # Kept for the backward pass, in floats a token: what autograd saves, as a test counts.
    queries, keys = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    attention = (3 if model.qk_norm else 1) * (queries + keys) + keys + 2 * queries
    block = 7 * model.d_model + attention + 4 * model.d_ff
    loop = model.core_layers * block + (0 if model.injection == "none" else 8 * model.d_model)
    loops = config.mean_loops if config.loop_schedule != "fixed" else config.loops or max_loops
    loops = min(loops, max_loops)
    readouts = {"last": 1.0, "pair": min(2.0, loops), "all": loops}[config.loss_at]
    # With checkpointing each loop keeps its state, and one loop at a time all that it needs.
    core = 2 * loops * model.d_model + loop if config.grad_checkpointing else loops * loop
    heads = readouts * (model.coda_layers * block + 5 * model.d_model + 2 * model.vocab_size)
    floats = model.prelude_layers * block + core + heads
    blocks = model.prelude_layers + model.core_layers + model.coda_layers
    matrices = blocks * (model.d_model * (2 * queries + 2 * keys) + 3 * model.d_model * model.d_ff)
    muon = config.optimizer == "muon"
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        # AdamW keeps two numbers a weight, Muon one for each weight of a block's matrices.
        "optimizer": 8 * parameters - (4 * matrices if muon else 0),
        "activations": int(4 * rows * config.seq_len * floats),
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
