"""What every loop brings on held-out tokens: one pass of all depths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from looptx_core.model.loop import LoopedTransformer


@dataclass
class LoopEvaluation:
    """Sums over tokens for each loop; add evaluations up, then read the means.

    loss, correct, norm: (loops,) float64. probability, logit, hit: (loops, tokens), the
    confidence's inputs for calibration, or empty where they were not kept.
    """

    tokens: int
    loss: Tensor
    correct: Tensor
    norm: Tensor
    logit: Tensor
    hit: Tensor

    def __add__(self, other: LoopEvaluation) -> LoopEvaluation:
        return LoopEvaluation(
            self.tokens + other.tokens,
            self.loss + other.loss,
            self.correct + other.correct,
            self.norm + other.norm,
            torch.cat([self.logit, other.logit], 1),
            torch.cat([self.hit, other.hit], 1),
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


@torch.no_grad()
def evaluate_loops(
    model: LoopedTransformer,
    tokens: Tensor,
    loops: int,
    counted: Tensor | None = None,
    documents: Tensor | None = None,
) -> LoopEvaluation:
    """Loss, accuracy and confidence after each of the loops 1..loops.

    tokens: (batch, length + 1). counted: (batch, length) bool, the targets that count; all by
    default. documents: (batch, length), to attend within only.
    """
    targets = tokens[:, 1:]
    counted = torch.ones_like(targets, dtype=torch.bool) if counted is None else counted
    around = model.surroundings(targets.shape[1], documents=documents)
    losses, hits, norms, logits = [], [], [], []
    for loop, state in enumerate(model.states(tokens[:, :-1], loops, around=around), start=1):
        predicted = model.head(model.decode(state, around)).float()
        loss = F.cross_entropy(predicted.flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(loss.view(targets.shape)[counted].double().sum())
        hits.append((predicted.argmax(-1) == targets)[counted])
        norms.append(state.float().square().mean(-1).sqrt()[counted].double().sum())
        logits.append(model.confidence(state, loop).logit.float()[counted])
    hit = torch.stack(hits)
    return LoopEvaluation(
        tokens=int(counted.sum()),
        loss=torch.stack(losses).cpu(),
        correct=hit.double().sum(1).cpu(),
        norm=torch.stack(norms).cpu(),
        logit=torch.stack(logits).cpu(),
        hit=hit.float().cpu(),
    )


def evaluate_batch(
    model: LoopedTransformer, batch: Mapping[str, Tensor], loops: int
) -> LoopEvaluation:
    """`evaluate_loops` on a batch of the data module."""
    return evaluate_loops(model, batch["tokens"], loops, documents=batch.get("documents"))


def fit_temperature(logit: Tensor, hit: Tensor) -> float:
    """The temperature that minimises the cross-entropy of sigmoid(logit / T) against hits.

    Temperature scaling (Guo et al., arXiv 1706.04599), by golden-section search on log T, along
    which the cross-entropy has one minimum. logit, hit: any equal shapes.
    """

    def cost(log_t: float) -> float:
        scaled = logit.double() / torch.tensor(log_t).exp()
        return float(F.binary_cross_entropy_with_logits(scaled, hit.double()))

    low, high, golden = -2.0, 2.0, (5**0.5 - 1) / 2
    for _ in range(30):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if cost(left) < cost(right):
            high = right
        else:
            low = left
    return float(torch.tensor((low + high) / 2).exp())
