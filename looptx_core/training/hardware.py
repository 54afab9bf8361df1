"""What this machine does best: the number type, found by a short probe."""

from __future__ import annotations

import functools
import time

import torch

_CLEARLY = 1.3  # bf16 must win by this much: autocast adds conversions of its own


def choose_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """('bf16' or 'float32', the reason in one line)."""
    if asked != "auto":
        return asked, "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return "bf16", "this GPU has bf16 units"
        return "float32", "this GPU has no bf16 units"
    ratio = _ratio()
    reason = f"a probe's bf16 matrix product ran at {ratio:.2g} times float32's rate"
    return ("bf16" if ratio > _CLEARLY else "float32"), reason


@functools.cache
def _ratio() -> float:
    return _seconds(torch.float32) / _seconds(torch.bfloat16)


def _seconds(dtype: torch.dtype, size: int = 256, rounds: int = 5) -> float:
    """The best time of a matrix product of `size` cubed."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return best
