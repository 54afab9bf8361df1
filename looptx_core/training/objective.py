"""The loss of a looped model, and of its confidence head, from one forward pass.

Each sequence runs to its own depth (`loop_schedule`) and is read out after some of its loops. Its
loss is the mean over these readouts, weighted by a prior over loops if one is given, so that
sequences of depth 1 and of depth 10 count the same. With `loss_at="pair"` a sequence is read out
after its last two loops: as depths are drawn broadly, every loop is supervised, and every pair
shows how much one more loop gains.

The confidence head learns from the same readouts: the probability of the top token, and by how
much the next loop lowered the loss. The probability is the expectation of whether the top token is
right. As a target it lacks the noise of single tokens, and it is less inflated by memorised
training text: a head that learns hits and misses themselves predicts them less well on other text
(benchmarks/exits/confidence_targets.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from looptx_core.config.model import ModelConfig
from looptx_core.media.base import Encoded
from looptx_core.media.batch import Media, hidden_numbers
from looptx_core.media.registry import MEDIA
from looptx_core.model.block import ForwardContext
from looptx_core.model.flops import token_flops
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.score import Score, score
from looptx_core.parallel.ranks import has_ranks, max_over_ranks
from looptx_core.training.evaluate import inputs_and_targets
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.teacher import Teacher, divergence

_GAIN_LIMIT = 4.0  # nats; single tokens can gain more, and would dominate the squared error


@dataclass
class LoopLoss:
    """The objective on one batch. Losses are in nats a token."""

    loss: Tensor
    """Scalar, trains the trunk."""
    confidence_loss: Tensor
    """Scalar, trains the confidence head; no gradient reaches the trunk."""
    deepest: Tensor
    """Scalar, detached: the mean loss at each sequence's last loop."""
    confidence_error: Tensor
    """Scalar, detached: mean |P(correct) - correct| over the readouts."""
    mean_loops: float
    """Core iterations a token."""
    flops: float
    """Of the forward and backward passes together: three times the forward pass."""
    restored: Tensor | None = None
    """Scalar, detached: the media's own loss on hidden rows, which `loss` includes."""
    by_labels: dict[str, Tensor] = field(default_factory=dict)
    """Scalars, detached, by medium: the encoder's own loss, of which `loss` includes a share."""


@dataclass
class _ReadoutBatch:
    """States after several loops, gathered for one pass through coda and head."""

    states: list[Tensor] = field(default_factory=list)
    """Each (some rows, length, d_model)."""
    rows: list[int] = field(default_factory=list)
    """The sequence of each readout."""
    loops: list[int] = field(default_factory=list)
    """The loop of each readout."""

    def add(self, state: Tensor, rows: list[int], loop: int) -> None:
        if rows:
            self.states.append(state)
            self.rows += rows
            self.loops += [loop] * len(rows)


def loop_loss(
    model: LoopedTransformer,
    tokens: Tensor,
    schedule: LoopSchedule,
    step: int,
    ids: Tensor,
    *,
    targets: Tensor | None = None,
    documents: Tensor | None = None,
    weights: Tensor | None = None,
    media: Media | None = None,
    loss_at: str = "pair",
    loss_prior: float = 0.0,
    recompute: bool = False,
    progress: float = 0.0,
    teacher: Teacher | None = None,
    teacher_weight: float = 0.5,
) -> LoopLoss:
    """The objective on a batch.

    Args:
        tokens: (batch, length + 1) ids, each predicted from those before; or (batch, length) with
            `targets` of the same shape.
        schedule: draws each sequence's depth for this `step`.
        ids: (batch,), the samples' numbers.
        documents: (batch, length), the document of each input token; attention stays within it.
        weights: (batch, length), how much each target counts, about 1 in the mean over all
            batches; 1 by default.
        media: the items of the placeholder tokens; those with hidden rows add a loss of their own.
        loss_at: after which of its loops a sequence is read out: last, pair (the last two) or all.
        loss_prior: among several readouts of a sequence, loop t counts t to this power.
        recompute: save memory by running each loop again in the backward pass.
        progress: the share of the training that is done, with which the encoders' own losses fall.
        teacher: each readout learns its probabilities too.
        teacher_weight: the share of the loss that is the divergence from the teacher.
    """
    inputs, labels = inputs_and_targets(tokens, targets)
    batch, length = inputs.shape
    layout = model.layout(inputs, media)
    ctx = model.context(length, documents=documents, layout=layout)

    run = partial(checkpoint, model.step, use_reentrant=False) if recompute else model.step
    encoded = model.encode(media)
    state = embedding = model.embed(inputs, ctx, encoded=encoded)
    # The rule by loss chooses depths after the loops that every sequence runs.
    shared_loops = range(1, schedule.base + 1 if schedule.kind == "loss" else 1)
    # A memory is written by the last loop of a block, so that there the loops start over.
    again = model.config.has_memory
    with torch.set_grad_enabled(torch.is_grad_enabled() and not again):
        shared = [after for _, after in model.iterate(state, embedding, ctx, shared_loops, run)]
    state = shared[-1] if shared else state
    depths = schedule.depths(
        step, ids, lambda by: _measure(model, state, schedule.base, labels, ctx, by, weights)
    )
    if again:
        shared, state = [], embedding

    # Sorted by depth, deepest first, the sequences that still run are always the first rows.
    order = depths.argsort(descending=True, stable=True)
    depths = depths[order]
    on_device = order.to(state.device)
    state, embedding, ctx = state[on_device], embedding[on_device], ctx.rows(on_device)
    labels = labels[on_device]
    weights = None if weights is None else weights[on_device]
    shared = [after[on_device] for after in shared]
    readouts = _ReadoutBatch()
    core_rows = batch * len(shared)

    def rows_at(loop: int) -> int:
        """How many sequences run a loop."""
        return int((depths >= loop).sum())

    # Sharded weights are gathered at each loop, which takes every rank.
    deepest = max_over_ranks(int(depths[0]), state.device)
    remaining = range(len(shared) + 1, deepest + 1)
    states = itertools.chain(
        enumerate(shared, start=1),
        model.iterate(state, embedding, ctx, remaining, run, rows_at),
    )
    for loop, after in itertools.islice(states, deepest):
        state, stop = after, rows_at(loop)
        if loop > len(shared):
            core_rows += len(state)
        start = {
            "last": int((depths > loop).sum()),
            "pair": int((depths > loop + 1).sum()),
            "all": 0,
        }[loss_at]
        readouts.add(state[start:stop], list(range(start, stop)), loop)
    taught = None
    if teacher is not None:
        taught = teacher.logits(model, inputs, documents, media)[on_device]
    scored = _score(model, readouts, labels, weights, ctx, taught)
    state = _with_unused_media(model, state, media)
    result = _combine(
        model, scored, depths, loss_prior, teacher_weight, tie=state, core_rows=core_rows
    )
    if teacher is not None:
        cost = token_flops((teacher.model or model).config, length / 2)
        result.flops += cost.at(teacher.loops) * batch * length
    _add_media(result, model, media or {}, scored, inputs, on_device)
    _add_encoder_losses(result, model, encoded, progress)
    return result


def _add_media(
    result: LoopLoss,
    model: LoopedTransformer,
    media: Media,
    scored: _Scored,
    inputs: Tensor,
    order: Tensor,
) -> None:
    """Add the encoders' FLOPs, and the loss of media with hidden rows.

    inputs: (batch, length), in the batch's order. order: (batch,), the order that `scored` counts
    sequences in.
    """
    for name, items in media.items():
        medium = MEDIA[name]
        result.flops += 3 * medium.flops(model.config) * len(items.features)
        if items.hidden is not None:
            numbers = hidden_numbers(inputs, medium.token(model.config), items.hidden)
            numbers = numbers[order][torch.tensor(scored.rows, device=numbers.device)]
            own = medium.losses(model.heads()[name], scored.decoded, numbers, items)
            restored = 0.0 if result.restored is None else result.restored
            result.loss, result.restored = result.loss + own.loss, restored + own.loss.detach()
            result.confidence_loss = result.confidence_loss + own.confidence_loss


def _add_encoder_losses(
    result: LoopLoss, model: LoopedTransformer, encoded: Mapping[str, Encoded], progress: float
) -> None:
    """Add each encoder's own loss on its labels, with the weight that it has by now."""
    for name, read in encoded.items():
        if read.loss is not None:
            share = MEDIA[name].loss_weight(model.config, progress)
            result.loss = result.loss + share * read.loss
            result.by_labels[name] = read.loss.detach()


@torch.no_grad()
def _measure(
    model: LoopedTransformer,
    state: Tensor,
    loop: int,
    targets: Tensor,
    ctx: ForwardContext,
    by: str,
    weights: Tensor | None,
) -> Tensor:
    """What decides which sequences go deeper: their "gain" or "loss", (batch,), nats a token."""
    if by == "gain":
        return _average(model.confidence(state, loop).gain.float(), weights, 1)
    scored = model.score(model.coda_hidden(state, ctx).flatten(0, 1), targets.flatten())
    return _average(scored.loss.view(targets.shape), weights, 1)


@dataclass
class _Scored:
    """Readouts and their scores; each tensor is (readouts, length)."""

    rows: list[int]
    loops: list[int]
    score: Score
    logit: Tensor
    gain: Tensor
    weights: Tensor | None
    counted: float
    """Share of the targets whose weight is not 0."""
    decoded: Tensor
    """The head's input, (readouts, length, d_model)."""
    divergence: Tensor | None
    """From the teacher, nats; None without one."""


def _score(
    model: LoopedTransformer,
    readouts: _ReadoutBatch,
    targets: Tensor,
    weights: Tensor | None,
    ctx: ForwardContext,
    taught: Tensor | None,
) -> _Scored:
    """Coda, head and confidence head, once for all readouts.

    targets, weights: (batch, length). ctx: of the batch. taught: the teacher's logits, (batch,
    length, vocab_size).
    """
    states = torch.cat(readouts.states)
    rows = torch.tensor(readouts.rows, device=targets.device)
    targets = targets[rows]
    weights = None if weights is None else weights[rows]
    decoded = model.coda_hidden(states, ctx.rows(rows))
    flat, flat_targets, counted = decoded.flatten(0, 1), targets.flatten(), None
    if weights is not None and bool((weights == 0).any()):
        # Skip the product with the vocabulary for targets that don't count, as placeholders.
        counted = weights.flatten() > 0
        flat, flat_targets = flat[counted], flat_targets[counted]
    apart = None
    if taught is None:
        scored = model.score(flat, flat_targets)
    else:
        logits, taught = model.logits(flat).float(), taught[rows].flatten(0, 1)
        scored = score(logits, flat_targets)
        apart = divergence(taught if counted is None else taught[counted], logits)
    if counted is not None:
        zeros = scored.loss.new_zeros(targets.numel())
        scored = Score(*(zeros.masked_scatter(counted, part) for part in scored))
        apart = None if apart is None else zeros.masked_scatter(counted, apart)
    confidence = model.confidence(states, torch.tensor(readouts.loops, device=states.device))
    return _Scored(
        readouts.rows,
        readouts.loops,
        Score(*(part.view(targets.shape) for part in scored)),
        confidence.logit.float(),
        confidence.gain.float(),
        weights,
        1.0 if counted is None else float(counted.float().mean()),
        decoded,
        None if apart is None else apart.view(targets.shape),
    )


def _combine(
    model: LoopedTransformer,
    scored: _Scored,
    depths: Tensor,
    prior: float,
    teacher_weight: float,
    tie: Tensor,
    core_rows: int,
) -> LoopLoss:
    """The losses from all readouts.

    depths: (batch,). tie: enters the loss with weight 0, so that its gradients exist on every rank.
    core_rows: passes of the core, counted in sequences.
    """
    batch, length = len(depths), scored.score.loss.shape[1]
    rows, loops = torch.tensor(scored.rows), torch.tensor(scored.loops)
    share = loops.double() ** prior
    weight = share / torch.zeros(batch).double().index_add(0, rows, share)[rows] / batch
    losses = scored.score.loss.detach()
    learned = scored.score.loss
    if scored.divergence is not None:
        learned = (1 - teacher_weight) * learned + teacher_weight * scored.divergence
    by_readout = _weigh(learned, scored.weights).mean(1)
    loss = (by_readout * weight.to(by_readout)).sum() + 0.0 * tie.float().sum()

    confidence_loss = F.binary_cross_entropy_with_logits(
        scored.logit, scored.score.top, weight=scored.weights
    )
    index = {key: i for i, key in enumerate(zip(scored.rows, scored.loops))}
    pairs = [(i, index[row, loop + 1]) for (row, loop), i in index.items()
             if (row, loop + 1) in index]  # fmt: skip
    if pairs:
        now, then = torch.tensor(pairs, device=by_readout.device).T
        gains = (losses[now] - losses[then]).clamp(-_GAIN_LIMIT, _GAIN_LIMIT)
        errors = F.mse_loss(scored.gain[now], gains, reduction="none")
        confidence_loss = confidence_loss + _weigh(errors, scored.weights, now).mean()
    else:
        confidence_loss = confidence_loss + 0.0 * scored.gain.sum()

    readouts = len(scored.rows) / batch
    final = (depths[rows] == loops).to(by_readout.device)
    return LoopLoss(
        loss=loss,
        confidence_loss=confidence_loss,
        deepest=_average(losses[final], None if scored.weights is None else scored.weights[final]),
        confidence_error=_average(
            (scored.logit.detach().sigmoid() - scored.score.hit).abs(), scored.weights
        ),
        mean_loops=core_rows / batch,
        flops=training_flops(model.config, length, core_rows / batch, readouts, scored.counted)
        * batch
        * length,
    )


def training_flops(
    config: ModelConfig, length: int, loops: float, readouts: float, counted: float
) -> float:
    """Of a token, forward and backward: three times the forward pass.

    length: of its sequence. counted: the share of targets that count; others skip the head.
    """
    skipped = readouts * (1 - counted) * 2 * config.d_model * config.vocab_size
    forward = token_flops(config, length / 2).at(loops, readouts, readouts, readouts)
    return 3 * (forward - skipped)


def _weigh(values: Tensor, weights: Tensor | None, rows: Tensor | slice = slice(None)) -> Tensor:
    """Values times their weights. These are normalised over the data and not over a batch, so that
    accumulation and the number of ranks change nothing."""
    return values if weights is None else values * weights[rows]


def _average(values: Tensor, weights: Tensor | None, dim: int | None = None) -> Tensor:
    """The weighted mean over all values or along one dimension, for reports."""
    if weights is None:
        return values.mean(dim)
    return (values * weights).sum(dim) / weights.sum(dim).clamp(min=1e-9)


def _with_unused_media(model: LoopedTransformer, state: Tensor, media: Media | None) -> Tensor:
    """The state plus 0 times the parameters of media that this batch lacks.

    Ranks sum up their gradients, so each needs a gradient, if of zeros, for media that only other
    ranks' batches have.
    """
    if not has_ranks():
        return state
    both = (*model.encoders().items(), *model.heads().items())
    unused = [module for name, module in both if name not in (media or {})]
    for p in (p for module in unused for p in module.parameters() if p.requires_grad):
        state = state + 0.0 * p.sum().to(state.dtype)
    return state
