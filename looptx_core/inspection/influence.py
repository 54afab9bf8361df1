"""Which earlier tokens influence a prediction: attention by loop and layer, tested by deletion.

Relevance follows Chefer et al. (arXiv 2103.15679). It is carried from the prediction backwards
through coda, loops and prelude. Each layer passes it on unchanged along the residual stream, and
along its attention in proportion to the positive part of attention times its gradient, averaged
over heads; the gradient is of the prediction's log-probability. Where a loop injects the prelude's
output, half of the relevance goes to it; streams carry that output along instead. Plain rollout
(arXiv 2005.00928) ranked tokens no better than chance on lines that need depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from looptx_core.model.attention import Recording
from looptx_core.model.loop import LoopedTransformer

_RANDOM_DRAWS = 4
_ROWS = 16  # positions at a time; each is a row of a batch, with its own attention weights


def relevance(rows: Tensor, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Carry relevance back through layers, the last one first.

    rows: (batch, length), relevance after these layers. weights, gradients: each layer's
    attention (batch, heads, length, length) in the order of the forward pass. Returns (batch,
    length), relevance before them.
    """
    for weight, gradient in zip(reversed(weights), reversed(gradients)):
        used = (weight * gradient).clamp(min=0).mean(1)
        rows = rows + torch.einsum("bi,bij->bj", rows, used)
    return rows


def influence(model: LoopedTransformer, tokens: Tensor, depths: Tensor) -> Tensor:
    """The share of each earlier token in each position's top prediction, (length, length).

    tokens: (length,). depths: (length,), the loop after which each position is read out. Rows sum
    to 1 over earlier positions, or to 0 where no attention mattered. `model.attend` is replaced
    meanwhile, and restored.
    """
    shares = torch.zeros(len(tokens), len(tokens))
    before = model.attend
    try:
        for depth in sorted(set(depths.tolist())):
            for positions in (depths == depth).nonzero()[:, 0].split(_ROWS):
                shares[positions] = _influence_at(model, tokens, positions, depth).cpu()
    finally:
        model.attend = before
    earlier = shares.tril(-1)
    return earlier / earlier.sum(1, keepdim=True).clamp(min=1e-12)


@torch.enable_grad()
def _influence_at(
    model: LoopedTransformer, tokens: Tensor, positions: Tensor, depth: int
) -> Tensor:
    """Relevance of all tokens for some positions at one depth, (positions, length)."""
    recording = model.attend = Recording()
    ctx = model.context(len(tokens))
    batch = tokens.expand(len(positions), -1)
    *_, state = model.states(batch, depth, ctx)
    at = (torch.arange(len(positions), device=tokens.device), positions.to(tokens.device))
    logprobs = model.head(model.coda_hidden(state, ctx)[at]).float().log_softmax(-1)
    weights = recording.weights
    gradients = torch.autograd.grad(logprobs.amax(-1).sum(), weights)
    weights = [weight.detach() for weight in weights]

    def back(rows: Tensor, first: int, layers: int) -> Tensor:
        span = slice(first, first + layers)
        return relevance(rows, weights[span], gradients[span])

    config = model.config
    rows = torch.zeros(batch.shape, device=tokens.device)
    rows[at] = 1.0
    rows = back(rows, len(weights) - config.coda_layers, config.coda_layers)
    injected = torch.zeros_like(rows)
    for loop in reversed(range(depth)):
        rows = back(rows, config.prelude_layers + loop * config.core_layers, config.core_layers)
        if config.injection not in ("none", "norm", "streams"):
            rows, injected = 0.5 * rows, injected + 0.5 * rows
    return back(rows + injected, 0, config.prelude_layers)


@torch.no_grad()
def without(model: LoopedTransformer, tokens: Tensor, removed: Tensor, loops: int) -> Tensor:
    """Log-probabilities after a loop if no other token attends to the removed ones.

    tokens: (length,). removed: (variants, length) bool; a removed token still sees itself.
    Returns (variants, length, vocab_size).
    """
    length = len(tokens)
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    own = torch.eye(length, dtype=torch.bool, device=tokens.device)
    mask = (causal & ~removed[:, None, :]) | own
    ctx = replace(model.context(length), mask=mask[:, None])
    *_, state = model.states(tokens.expand(len(removed), -1), loops, ctx)
    return model.head(model.coda_hidden(state, ctx)).float().log_softmax(-1)


@dataclass(frozen=True)
class DeletionTest:
    """Mean drop of the top prediction's log-probability, in nats, when tokens are removed."""

    influential: float
    random: float
    positions: int
    removed: int
    """How many tokens were removed for each position."""


def deletion_test(
    model: LoopedTransformer,
    tokens: Tensor,
    shares: Tensor,
    depths: Tensor,
    *,
    removed: int = 3,
    positions: int = 16,
    seed: int = 0,
) -> DeletionTest | None:
    """Compare removing a position's most influential tokens with removing random ones.

    shares, depths: as in `influence`. removed: how many earlier tokens to remove. positions: how
    many to test, spread over the text. None if no position has more than twice `removed` tokens
    before it.
    """
    length = len(tokens)
    if length <= 2 * removed + 1:
        return None
    candidates = torch.arange(2 * removed + 1, length)
    spread = torch.linspace(0, len(candidates) - 1, min(positions, len(candidates)))
    chosen = candidates[spread.long()]
    generator = torch.Generator().manual_seed(seed)
    drops: list[list[float]] = []
    for i in chosen.tolist():
        top = shares[i, :i].topk(removed).indices
        draws = [torch.randperm(i, generator=generator)[:removed] for _ in range(_RANDOM_DRAWS)]
        gone = torch.zeros(2 + len(draws), length, dtype=torch.bool)
        for row, which in enumerate([top, *draws], start=1):
            gone[row, which] = True
        logprobs = without(model, tokens, gone.to(tokens.device), int(depths[i]))[:, i].cpu()
        drop = logprobs[0].max() - logprobs[:, logprobs[0].argmax()]
        drops.append([float(drop[1]), float(drop[2:].mean())])
    influential, random = torch.tensor(drops).mean(0).tolist()
    return DeletionTest(influential, random, len(chosen), removed)
