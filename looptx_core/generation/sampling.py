"""Drawing the next token from a row of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from looptx_core.config.generation import GenerationOptions
from looptx_core.config.ranges import check_ranges
from looptx_core.errors import DataError, UsageError

_SMALLEST = 1e-30
"""Smaller divisors are 0 in the logits' type, or make infinities of them."""


def check(options: GenerationOptions) -> None:
    """Raise `UsageError` for settings that are out of range."""
    check_ranges(options)
    if "" in options.stop:
        raise UsageError("`stop` '': give a string that is not empty")


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make seen tokens less likely (CTRL, arXiv 1909.05858). logits (vocab,), seen (n,) ids."""
    values, penalty = logits[seen], min(max(penalty, _SMALLEST), 1 / _SMALLEST)
    return logits.index_put((seen,), torch.where(values > 0, values / penalty, values * penalty))


def keep(logits: Tensor, options: GenerationOptions) -> Tensor:
    """A mask, (vocab,), of the tokens that may be drawn: top-k, then top-p and min-p of the rest.

    logits: (vocab,), already divided by the temperature. The most likely token always stays.
    """
    kept = torch.ones_like(logits, dtype=torch.bool)
    if 0 < options.top_k < logits.numel():
        best = logits.topk(options.top_k).indices
        kept = torch.zeros_like(kept).index_fill(0, best, True)
    if options.top_p < 1 or options.min_p > 0:
        chances = logits.masked_fill(~kept, float("-inf")).softmax(-1)
        kept &= chances >= options.min_p * chances.max()
        if options.top_p < 1:
            ordered, order = chances.sort(descending=True, stable=True)
            # The sum before a token decides, so that the token that crosses the bound stays.
            inside = ordered.cumsum(-1) - ordered < max(options.top_p, _SMALLEST)
            kept &= torch.zeros_like(kept).index_put((order,), inside)
    return kept


def chances(logits: Tensor, options: GenerationOptions, seen: Tensor) -> Tensor:
    """Each token's probability to be drawn next, (vocab,) float64, on the CPU.

    At temperature 0 the most likely token has all of it. logits: (vocab,). seen: (n,), the ids so
    far.
    """
    if options.repetition_penalty != 1.0:
        logits = penalise(logits, seen, options.repetition_penalty)
    if options.temperature == 0:
        one = torch.zeros(logits.shape, dtype=torch.float64)
        one[int(logits.argmax())] = 1
        return one
    logits = (logits - logits.max()) / max(options.temperature, _SMALLEST)  # no overflow near 0
    # On the CPU in one type, so that a seed means the same tokens on every device.
    return logits.masked_fill(~keep(logits, options), float("-inf")).softmax(-1).double().cpu()


def check_number(chance: float) -> None:
    """Raise `DataError` for a probability, or its logarithm, that is NaN."""
    if math.isnan(chance):
        raise DataError(
            "the model's logits are no numbers, so its weights are damaged or overflow; copy the "
            "model again"
        )


def pick(chances: Tensor, generator: torch.Generator) -> int:
    """Draw a token by its probability, (vocab,); a certain one uses no random number.

    Raises `DataError` for probabilities that are NaN.
    """
    best = int(chances.argmax())
    highest = float(chances[best])
    check_number(highest)
    if highest == 1:
        return best
    return int(torch.multinomial(chances, 1, generator=generator))


def sample(
    logits: Tensor, options: GenerationOptions, seen: Tensor, generator: torch.Generator
) -> int:
    """The next token's id from logits (vocab,)."""
    if options.temperature == 0 and options.repetition_penalty == 1.0:
        return int(logits.argmax())
    return pick(chances(logits, options, seen), generator)
