"""What every loop brings on held-out tokens: one pass of all depths."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from looptx_core.config.generation import ExitSettings
from looptx_core.model.confidence import Confidence, sharpness
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.vision import Pictures

Observe = Callable[[int, Tensor, Tensor, Confidence], object]
"""Called after each loop, counted from 1, with the counted tokens' states (tokens, d_model), logits
(tokens, vocab_size) and confidence, each (tokens,)."""


@dataclass
class LoopEvaluation:
    """Sums over tokens for each loop; add evaluations up, then read the means.

    loss, correct, norm: (loops,) float64. logit, hit, gain, each, sharp: (loops, tokens), what the
    confidence head said, whether the top token was right, the loss, and the log-odds of the top
    token's own probability, for calibration.
    """

    tokens: int
    loss: Tensor
    correct: Tensor
    norm: Tensor
    logit: Tensor
    hit: Tensor
    gain: Tensor
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
    pictures: Pictures | None = None,
) -> LoopEvaluation:
    """Loss, accuracy and confidence after each of the loops 1..loops.

    tokens, targets: as in `inputs_and_targets`. counted: (batch, length) bool, the targets that
    count; all by default. documents: (batch, length), to attend within only. observe: sees every
    loop's tokens. pictures: of the image tokens.
    """
    device = model.norm.weight.device
    tokens, pictures = tokens.to(device), pictures and pictures.to(device)
    targets, counted, documents = (
        part if part is None else part.to(device) for part in (targets, counted, documents)
    )
    inputs, targets = inputs_and_targets(tokens, targets)
    counted = torch.ones_like(targets, dtype=torch.bool) if counted is None else counted
    layout = model.layout(inputs, pictures)
    around = model.surroundings(targets.shape[1], documents=documents, layout=layout)
    losses, hits, norms, logits, gains, sharp = [], [], [], [], [], []
    states = model.states(inputs, loops, around=around, pictures=pictures)
    for loop, state in enumerate(states, start=1):
        predicted = model.head(model.decode(state, around)).float()
        loss = F.cross_entropy(predicted.flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(loss.view(targets.shape)[counted])
        hits.append((predicted.argmax(-1) == targets)[counted])
        sharp.append(sharpness(predicted[counted].log_softmax(-1)))
        norms.append(state.float().square().mean(-1).sqrt()[counted].double().sum())
        judged = model.confidence(state, loop)
        logits.append(judged.logit.float()[counted])
        gains.append(judged.gain.float()[counted])
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
        each=each.cpu(),
        sharp=torch.stack(sharp).cpu(),
    )


def pictures_of(batch: Mapping[str, Tensor]) -> Pictures | None:
    """A batch's pictures, where it has any."""
    return Pictures(batch["patches"], batch["grids"]) if "patches" in batch else None


def evaluate_batch(
    model: LoopedTransformer, batch: Mapping[str, Tensor], loops: int
) -> LoopEvaluation:
    """`evaluate_loops` on a batch of the data module; targets of weight 0 don't count."""
    weights = batch.get("weights")
    counted = None if weights is None else weights > 0
    pictures, documents = pictures_of(batch), batch.get("documents")
    return evaluate_loops(model, batch["tokens"], loops, counted, documents, pictures=pictures)


def evaluate_all(
    model: LoopedTransformer, batches: Iterable[Mapping[str, Tensor]], loops: int
) -> LoopEvaluation:
    """`evaluate_batch` on all batches, added up."""
    parts = (evaluate_batch(model, batch, loops) for batch in batches)
    return functools.reduce(operator.add, parts)


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


def fit_gain(gain: Tensor, loss: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Slopes and offsets, one for each loop but the last, that make predicted gains true ones.

    Least squares of the drop that followed on the drop predicted; a slope is never negative. A
    loop after which nothing comes any more gets a slope of 0, whatever the head's noise.
    gain, loss: (loops, tokens), nats.
    """
    slopes, offsets = [], []
    for predicted, drop in zip(gain.double(), (loss[:-1] - loss[1:]).double()):
        spread = predicted - predicted.mean()
        slope = float((spread * drop).mean() / spread.square().mean().clamp(min=1e-12))
        slopes.append(max(slope, 0.0))
        offsets.append(float(drop.mean()) - slopes[-1] * float(predicted.mean()))
    return tuple(slopes), tuple(offsets)


def fit_stated(logit: Tensor, sharp: Tensor, hit: Tensor) -> tuple[float, ...]:
    """`ExitSettings.stated`: logistic regression of hits on both log-odds (Platt, 1999).

    Newton's method; the cross-entropy has one minimum. logit, sharp, hit: any equal shapes.
    """
    inputs = torch.stack([torch.ones_like(logit), logit, sharp], -1).flatten(0, -2).double()
    wanted, weights = hit.flatten().double(), torch.zeros(3, dtype=torch.double)
    scale = inputs.square().mean(0).sqrt().clamp(min=1e-6)
    inputs = inputs / scale
    # A trace of decay keeps the weights finite where hits can be told without an error.
    decay = 1e-4 * torch.eye(3, dtype=torch.double)
    for _ in range(50):
        sure = torch.sigmoid(inputs @ weights)
        slope = inputs.T @ (sure - wanted) / len(inputs) + decay @ weights
        curve = (inputs.T * (sure * (1 - sure))) @ inputs / len(inputs) + decay
        step = torch.linalg.solve(curve, slope)
        weights = weights - step * min(1.0, 2.0 / float(step.norm().clamp(min=1e-12)))
        if step.norm() < 1e-9:
            break
    return tuple((weights / scale).tolist())


def calibrate(settings: ExitSettings, held_out: LoopEvaluation) -> ExitSettings:
    """The exit settings with confidences and gains fitted on these tokens, where they may stop."""
    first = min(settings.min_loops, len(held_out.each)) - 1
    logit, sharp, hit = (part[first:] for part in (held_out.logit, held_out.sharp, held_out.hit))
    slope, offset = fit_gain(held_out.gain, held_out.each)
    return replace(
        settings,
        temperature=fit_temperature(logit, hit),
        stated=fit_stated(logit, sharp, hit),
        gain_slope=slope,
        gain_offset=offset,
    )
