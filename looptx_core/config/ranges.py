"""The numbers that settings may have, by key: one range for a name, wherever it stands."""

from __future__ import annotations

import math
from typing import Any

from looptx_core.errors import UsageError

_NAMES = {
    "[1, inf)": """
        steps seq_len batch_size micro_batch devices nodes save_every keep profile val_every
        val_batches log_every lora_rank max_new_tokens shard_tokens limit max_batch max_context
        eval_every eval_limit
    """,
    "[0, inf)": """
        workers decode_tokens weight_decay clip temperature top_k speculate max_queue drain_seconds
    """,
    "(0, inf)": """
        lr epochs max_minutes mean_loops lora_alpha repetition_penalty finetune_steps
        request_timeout
    """,
    "[0, 1]": "teacher_weight min_lr warmup lr_decay grow_share deeper_share explore min_p",
    "(0, 1]": "top_p",
    "[0, 1)": "beta2 lora_dropout mask_patches",
    "(0, 1)": "val_fraction",
    "[1, 1048576]": "memory_window memory_block",
    "[1, 16777216]": "vocab_size",
    "[1, 1000]": "loops max_loops min_loops prompt_loops draw_steps",
    "[0, 100]": "guidance draw_guidance",
    "[0, 65535]": "port",
    "(-100, 100)": "loss_prior",
    "(-inf, inf)": "loss_threshold threshold",
    "[0, 9223372036854775808)": "seed",
}
RANGES = {name: bounds for bounds, names in _NAMES.items() for name in names.split()}
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
