"""The numbers that settings may have, by key: one range for a name, wherever it stands."""

from __future__ import annotations

import math
from typing import Any

from looptx_core.errors import UsageError

_AT_LEAST_1 = (
    *(
        "steps",
        "seq_len",
        "batch_size",
        "micro_batch",
        "devices",
        "nodes",
        "save_every",
        "keep",
        "profile",
    ),
    *("val_every", "val_batches", "log_every", "loops", "max_loops", "lora_rank", "vocab_size"),
    *("max_new_tokens", "min_loops", "prompt_loops", "shard_tokens", "limit"),
)
RANGES = {
    **dict.fromkeys(_AT_LEAST_1, "[1, inf)"),
    **dict.fromkeys(
        (
            *("workers", "decode_tokens", "weight_decay", "clip", "temperature", "top_k"),
            "speculate",
        ),
        "[0, inf)",
    ),
    **dict.fromkeys(
        ("lr", "max_minutes", "mean_loops", "lora_alpha", "repetition_penalty"), "(0, inf)"
    ),
    "finetune_steps": "(0, inf)",
    **dict.fromkeys(
        ("min_lr", "warmup", "lr_decay", "grow_share", "deeper_share", "explore", "min_p"), "[0, 1]"
    ),
    "top_p": "(0, 1]",
    **dict.fromkeys(("beta2", "lora_dropout", "mask_patches"), "[0, 1)"),
    "val_fraction": "(0, 1)",
    "loss_prior": "(-100, 100)",
    **dict.fromkeys(("loss_threshold", "threshold"), "(-inf, inf)"),
    "seed": "[0, 9223372036854775808)",
}
"""As in mathematics: a square bracket takes the bound in."""


def check_ranges(settings: Any) -> None:
    """Raise `UsageError` for a number of a dataclass of settings that is out of its range."""
    for name in RANGES:
        check_range(name, getattr(settings, name, None))


def check_range(name: str, value: Any) -> None:
    """Raise `UsageError` for a number that is out of the range of `name`."""
    if isinstance(value, int | float) and not _inside(value, RANGES[name]):
        raise UsageError(f"`{name}` must {_phrase(RANGES[name])}, not {value}")


def _inside(value: float, text: str) -> bool:
    low, high = _limits(text)
    above = value >= low if text[0] == "[" else value > low
    return above and (value <= high if text[-1] == "]" else value < high)


def _limits(text: str) -> tuple[float, float]:
    low, high = text[1:-1].split(", ")
    return float(low), float(high)


def _phrase(text: str) -> str:
    low, high = _limits(text)
    if math.isinf(low):
        return "be finite"
    least = f"be {'at least' if text[0] == '[' else 'above'} {low:g}"
    if math.isinf(high):
        return f"{least} and finite"
    if text[0] + text[-1] in ("[]", "()"):
        return f"lie between {low:g} and {high:g}"
    return f"{least} and {'at most' if text[-1] == ']' else 'below'} {high:g}"
