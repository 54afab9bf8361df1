"""What every loop brings on held-out tokens: one pass of all depths."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from looptx_core.media.batch import Media, from_entries, to_device
from looptx_core.model.confidence import Confidence, relative_change, top_log_odds
from looptx_core.model.loop import LoopedTransformer

Observe = Callable[[int, Tensor, Tensor, Confidence], object]
"""Called after each loop, counted from 1, with the counted tokens' states (tokens, d_model), logits
(tokens, vocab_size) and confidence, each (tokens,)."""


@dataclass
class LoopEvaluation:
    """Sums over tokens for each loop; add evaluations up, then read the means.

    loss, correct, norm: (loops,) float64. logit, hit, gain, change, each, sharp: (loops, tokens),
    what the confidence head said, whether the top token was right, by how much the loop changed
    the state, the loss, and the log-odds of the top token's own probability, for calibration.
    """

    tokens: int
    loss: Tensor
    correct: Tensor
    norm: Tensor
    logit: Tensor
    hit: Tensor
    gain: Tensor
    change: Tensor
    each: Tensor
    sharp: Tensor

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
            torch.cat([self.each, other.each], 1),
            torch.cat([self.sharp, other.sharp], 1),
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
    """Both (batch, length). Absent targets are the tokens that follow, of one token more."""
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
    count; all by default. documents: (batch, length), to attend within only. observe: sees every
    loop's tokens. media: of the placeholder tokens.
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
    losses, hits, norms, logits, gains, changes, sharp = [], [], [], [], [], [], []
    before = embedding = model.embed(inputs, ctx, media=media)
    for loop, state in model.iterate(embedding, embedding, ctx, range(1, loops + 1)):
        predicted = model.head(model.coda_hidden(state, ctx)).float()
        loss = F.cross_entropy(predicted.flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(loss.view(targets.shape)[counted])
        hits.append((predicted.argmax(-1) == targets)[counted])
        sharp.append(top_log_odds(predicted[counted].log_softmax(-1)))
        norms.append(state.float().square().mean(-1).sqrt()[counted].double().sum())
        judged = model.confidence(state, loop)
        logits.append(judged.logit.float()[counted])
        gains.append(judged.gain.float()[counted])
        changes.append(relative_change(before, state)[counted])
        before = state
        if observe is not None:
            observe(loop, state[counted], predicted[counted], Confidence(logits[-1], gains[-1]))
    hit, each = torch.stack(hits), torch.stack(losses)
    return LoopEvaluation(
        tokens=int(counted.sum()),
        loss=each.double().sum(1).cpu(),
        correct=hit.double().sum(1).cpu(),
        norm=torch.stack(norms).cpu(),
        logit=torch.stack(logits).cpu(),
        hit=hit.float().cpu(),
        gain=torch.stack(gains).cpu(),
        change=torch.stack(changes).cpu(),
        each=each.cpu(),
        sharp=torch.stack(sharp).cpu(),
    )


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
