"""What this machine does best: the number type, found by a short probe."""

from __future__ import annotations

import functools
import time

import torch

_CLEARLY = 1.3  # bf16 must win by this much: autocast adds conversions of its own


def choose_precision(asked: str, device: torch.device, sharding: str = "none") -> tuple[str, str]:
    """('bf16' or 'float32', the reason in one line).

    sharding: the strategy, as of `RunConfig`.
    """
    if sharding.startswith("zero") and device.type == "cpu":
        # Lightning's precision for DeepSpeed has no autocast, and casts on GPUs alone.
        instead = " and not the bf16 that was asked for" if asked == "bf16" else ""
        return "float32", f"which is what ZeRO computes in on a CPU{instead}"
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
def _ratio(size: int = 256, rounds: int = 12) -> float:
    """The best of some products of `size` cubed each, in turn, by processor time: a busy machine
    must not look like one with bf16 units, without which bf16 is several times slower."""
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(rounds):
        for dtype in best:
            square = torch.ones(size, size, dtype=dtype)
            start, began = time.process_time(), time.perf_counter()
            square @ square
            took = time.process_time() - start
            if took <= 0:  # under a limit of processor time this clock ticks in milliseconds
                took = time.perf_counter() - began
            best[dtype] = min(best[dtype], max(took, 1e-9))
    return best[torch.float32] / best[torch.bfloat16]
