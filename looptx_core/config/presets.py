"""Named shapes with training settings that fit them. Plain data: every key can be overridden."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from looptx_core.errors import UsageError

Preset = dict[str, dict[str, Any]]
"""`model`: keys of `ModelConfig`; `train`: keys of `TrainConfig`. Absent keys: the defaults."""

PRESETS: dict[str, Preset] = {
    # 0.8M with 4,096 tokens. The whole stack looped, one layer a loop: what a task needs in
    # layers elsewhere, it needs in loops here.
    "nano": {
        "model": {"d_ff": 512, "prelude_layers": 0, "core_layers": 1, "coda_layers": 0},
        "train": {},
    },
    # nano in the parts that llama.cpp's looped stack has, for `convert --to-gguf`.
    "portable": {
        "model": {
            "d_ff": 512,
            "prelude_layers": 0,
            "core_layers": 1,
            "coda_layers": 0,
            "activation": "silu",
            "qk_norm": False,
            "injection": "norm",
        },
        "train": {},
    },
    # 27M, blocks 2 + 4 x 2 + 2: effective depth 12 at two loops.
    "small": {
        "model": {
            "vocab_size": 4096,
            "d_model": 512,
            "n_heads": 8,
            "n_kv_heads": 4,
            "head_dim": 64,
            "d_ff": 1536,
            "prelude_layers": 2,
            "core_layers": 4,
            "coda_layers": 2,
        },
        "train": {"steps": 2000, "seq_len": 512, "batch_size": 32, "lr": 1e-3},
    },
    # 118M, blocks 2 + 4 x 3 + 2: effective depth 16 at three loops.
    "medium": {
        "model": {
            "vocab_size": 16384,
            "d_model": 1024,
            "n_heads": 16,
            "n_kv_heads": 8,
            "head_dim": 64,
            "d_ff": 3072,
            "prelude_layers": 2,
            "core_layers": 4,
            "coda_layers": 2,
        },
        "train": {
            "steps": 20_000,
            "seq_len": 1024,
            "batch_size": 64,
            "micro_batch": 8,
            "lr": 6e-4,
            "grad_checkpointing": True,
            "save_every": 500,
            "val_every": 500,
        },
    },
    # 1.0B.
    "1b": {
        "model": {
            "vocab_size": 32768,
            "d_model": 2048,
            "n_heads": 16,
            "n_kv_heads": 8,
            "head_dim": 128,
            "d_ff": 5632,
            "prelude_layers": 4,
            "core_layers": 12,
            "coda_layers": 4,
            "max_seq_len": 4096,
        },
        "train": {
            "steps": 40_000,
            "seq_len": 2048,
            "batch_size": 256,
            "micro_batch": 2,
            "lr": 3e-4,
            "grad_checkpointing": True,
            "save_every": 1000,
            "val_every": 1000,
        },
    },
    # 7.1B.
    "7b": {
        "model": {
            "vocab_size": 32768,
            "d_model": 4096,
            "n_heads": 32,
            "n_kv_heads": 8,
            "head_dim": 128,
            "d_ff": 14336,
            "prelude_layers": 6,
            "core_layers": 20,
            "coda_layers": 6,
            "max_seq_len": 4096,
        },
        "train": {
            "steps": 140_000,
            "seq_len": 2048,
            "batch_size": 512,
            "micro_batch": 1,
            "lr": 2e-4,
            "grad_checkpointing": True,
            "save_every": 1000,
            "val_every": 1000,
        },
    },
}


def get_preset(name: str) -> Preset:
    """The preset of this name. Raises `UsageError` for an unknown one."""
    if name not in PRESETS:
        raise UsageError(
            f"unknown preset '{name}'{suggestion(name, PRESETS)}; choose from {', '.join(PRESETS)}"
        )
    return PRESETS[name]


def suggestion(word: str, known: Iterable[str]) -> str:
    """', did you mean 'x'?' for the nearest known word, '' if none is near."""
    near = get_close_matches(word, list(known), n=1)
    return f", did you mean '{near[0]}'?" if near else ""
