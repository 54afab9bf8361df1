"""Sides of a comparison of decoding at batch 1, which take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.engine import Engine

Run = Callable[[], float]
"""Generates once; seconds for the tokens after the first."""


def by_engine(engine: Engine, prompt: list[int], loops: int, new: int) -> Run:
    """looptx, greedily, to a full number of new tokens."""
    options = GenerationOptions(loops=loops, temperature=0, max_new_tokens=new, ignore_eos=True)

    def run() -> float:
        steps = list(engine.generate([prompt], options))
        return steps[-1].seconds - steps[0].seconds

    return run


def by_transformers(model: Any, prompt: list[int], new: int, **settings: Any) -> Run:
    """transformers' `generate`, greedily, with a full number of new tokens."""
    import transformers

    ids = torch.tensor([prompt], device=model.device)

    class Clock(transformers.StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.first = self.first or time.perf_counter()
            return torch.zeros(1, dtype=torch.bool, device=input_ids.device)

    def run() -> float:
        clock = Clock()
        clock.first = 0.0
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                eos_token_id=None, pad_token_id=0, stopping_criteria=[clock], **settings,
            )  # fmt: skip
            out = out.cpu()
        assert out.shape[1] == len(prompt) + new
        return time.perf_counter() - clock.first

    return run


def measure(runs: dict[str, Run], rounds: int, new: int) -> dict[str, list[float]]:
    """Tokens a second by side and round."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            seconds = run()
            if number:  # the first round warms up
                rates[name].append((new - 1) / seconds)
    return rates


def summary(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of the rates, and of looptx's ratio to each other side, round by round."""
    return {
        "tokens_per_second": {name: statistics.median(found) for name, found in rates.items()},
        "ratio_to": {
            name: statistics.median(a / b for a, b in zip(rates["looptx"], others))
            for name, others in rates.items()
            if name != "looptx"
        },
        "rates": rates,
    }
