"""Evaluation after every loop: one forward pass of all loops gives every depth."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from looptx_core.errors import DataError
from looptx_core.media.batch import Media, from_entries, to_device
from looptx_core.model.confidence import Confidence, relative_change, top_log_odds
from looptx_core.model.loop import LoopedTransformer

Observe = Callable[[int, slice, Tensor, Tensor, Confidence], object]
"""Called after each loop, counted from 1, for a slice of the counted tokens after another, the same
ones in every loop: with their states (tokens, d_model), logits (tokens, vocab_size) and confidence,
each (tokens,)."""
_READ_OUT = 1 << 21
"""Logits at a time. Those of a whole batch would be written to memory and read back for each of
the sums below."""


@dataclass
class LoopEvaluation:
    """Figures for each loop. Evaluations can be added; the properties are means over all tokens."""

    tokens: int
    loss: Tensor
    """Sum over tokens in nats, (loops,) float64."""
    correct: Tensor
    """Tokens whose most likely token is right, (loops,) float64."""
    norm: Tensor
    """Sum over tokens of the state's root mean square, (loops,) float64."""
    logit: Tensor
    """The confidence head's log-odds, (loops, tokens)."""
    hit: Tensor
    """1 where the most likely token is right, else 0, (loops, tokens)."""
    gain: Tensor
    """The confidence head's predicted gain, before calibration, (loops, tokens)."""
    change: Tensor
    """`relative_change` of the state, (loops, tokens)."""
    token_loss: Tensor
    """Nats, (loops, tokens)."""
    top_log_odds: Tensor
    """Log-odds of the most likely token's own probability, (loops, tokens)."""

    def __add__(self, other: LoopEvaluation) -> LoopEvaluation:
        return LoopEvaluation(
            self.tokens + other.tokens,
            self.loss + other.loss,
            self.correct + other.correct,
            self.norm + other.norm,
            torch.cat([self.logit, other.logit], 1),
            torch.cat([self.hit, other.hit], 1),
            torch.cat([self.gain, other.gain], 1),
            torch.cat([self.change, other.change], 1),
            torch.cat([self.token_loss, other.token_loss], 1),
            torch.cat([self.top_log_odds, other.top_log_odds], 1),
        )

    @property
    def loss_by_loop(self) -> list[float]:
        """Nats a token."""
        return (self.loss / self.tokens).tolist()

    @property
    def accuracy_by_loop(self) -> list[float]:
        return (self.correct / self.tokens).tolist()

    @property
    def norm_by_loop(self) -> list[float]:
        """Root mean square of the state."""
        return (self.norm / self.tokens).tolist()

    @property
    def confidence_error(self) -> float:
        """Mean |P(correct) - correct| over tokens and loops."""
        return float((self.logit.sigmoid() - self.hit).abs().mean())


def inputs_and_targets(tokens: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (batch, length).

    tokens: (batch, length) with targets of the same shape; or (batch, length + 1) without, and then
    each token's target is the next one.
    """
    return (tokens[:, :-1], tokens[:, 1:]) if targets is None else (tokens, targets)


@torch.no_grad()
def evaluate_loops(
    model: LoopedTransformer,
    tokens: Tensor,
    loops: int,
    counted: Tensor | None = None,
    documents: Tensor | None = None,
    observe: Observe | None = None,
    targets: Tensor | None = None,
    media: Media | None = None,
) -> LoopEvaluation:
    """Loss, accuracy and confidence after each of the loops 1..loops.

    tokens, targets: as in `inputs_and_targets`. counted: (batch, length) bool, the targets that
    count; all by default. documents: (batch, length), the document of each token; attention stays
    within it. observe: see `Observe`. media: the items of the placeholder tokens.

    Raises `DataError` for a loss that is not finite.
    """
    device = model.norm.weight.device
    tokens, media = tokens.to(device), to_device(media or {}, device)
    targets, counted, documents = (
        part if part is None else part.to(device) for part in (targets, counted, documents)
    )
    inputs, targets = inputs_and_targets(tokens, targets)
    counted = torch.ones_like(targets, dtype=torch.bool) if counted is None else counted
    layout = model.layout(inputs, media)
    ctx = model.context(targets.shape[1], documents=documents, layout=layout)
    wanted = targets[counted]
    pieces = _slices(len(wanted), max(1, _READ_OUT // model.config.vocab_size))
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    odds: list[Tensor] = []
    norms, logits, gains, changes = [], [], [], []
    embedding = model.embed(inputs, ctx, media=media)
    before = model.injection.open(embedding)
    for loop, state in model.iterate(embedding, embedding, ctx, range(1, loops + 1)):
        decoded, seen = model.coda_hidden(state, ctx)[counted], state[counted]
        confidence = Confidence(*(part.float()[counted] for part in model.confidence(state, loop)))
        read = [torch.empty_like(wanted, dtype=torch.float32) for _ in range(3)]
        for rows in pieces:
            predicted = model.logits(decoded[rows]).float()
            log_probs = predicted.log_softmax(-1)
            read[0][rows] = -log_probs.gather(-1, wanted[rows, None])[:, 0]
            read[1][rows] = (predicted.argmax(-1) == wanted[rows]).float()
            read[2][rows] = top_log_odds(log_probs)
            if observe is not None:
                judged = Confidence(*(part[rows] for part in confidence))
                observe(loop, rows, seen[rows], predicted, judged)
        for found, part in zip((losses, hits, odds), read):
            found.append(part)
        norms.append(seen.float().square().mean(-1).sqrt().double().sum())
        logits.append(confidence.logit)
        gains.append(confidence.gain)
        changes.append(relative_change(before, state)[counted])
        before = state
    hit, token_loss = torch.stack(hits), torch.stack(losses)
    total = token_loss.double().sum(1).cpu()
    if not total.isfinite().all():
        raise DataError(
            "the model's loss is not finite, so its weights are damaged or overflow; copy the "
            "model again"
        )
    return LoopEvaluation(
        tokens=int(counted.sum()),
        loss=total,
        correct=hit.double().sum(1).cpu(),
        norm=torch.stack(norms).cpu(),
        logit=torch.stack(logits).cpu(),
        hit=hit.cpu(),
        gain=torch.stack(gains).cpu(),
        change=torch.stack(changes).cpu(),
        token_loss=token_loss.cpu(),
        top_log_odds=torch.stack(odds).cpu(),
    )


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, max(1, length), size)]


def evaluate_batch(
    model: LoopedTransformer,
    batch: Mapping[str, Tensor],
    loops: int,
    observe: Observe | None = None,
) -> LoopEvaluation:
    """`evaluate_loops` on a batch of the data module; targets of weight 0 don't count."""
    weights = batch.get("weights")
    counted = None if weights is None else weights > 0
    media, documents = from_entries(batch), batch.get("documents")
    return evaluate_loops(model, batch["tokens"], loops, counted, documents, observe, media=media)


def evaluate_all(
    model: LoopedTransformer, batches: Iterable[Mapping[str, Tensor]], loops: int
) -> LoopEvaluation:
    """`evaluate_batch` on all batches, added up."""
    parts = (evaluate_batch(model, batch, loops) for batch in batches)
    return functools.reduce(operator.add, parts)
