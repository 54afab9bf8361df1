"""The loss of a looped model, and of its confidence head, from one forward pass.

Each sequence runs to its own depth (`loop_schedule`) and is read out at some of its loops; its
loss is their mean, by a prior over the loops if one is given, so that depth 1 and depth 10 weigh
the same. `pair` reads a sequence's last two loops: with depths drawn broadly every loop is
supervised under the fixed prior that the draw implies, and the gain of one more loop is seen at
each pair.

The confidence head learns from the very same read-outs: how likely the top token was, and by how
much the next loop lowered the loss. That probability is what being right amounts to in the mean,
without the luck of the single token, and without what the trunk knows of its training text by
heart: on other text a head that learns hits tells them less well
(benchmarks/exits/confidence_targets.py).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from looptx_core.media.batch import Media, hidden_numbers
from looptx_core.media.registry import MEDIA
from looptx_core.model.block import ForwardContext
from looptx_core.model.flops import token_flops
from looptx_core.model.loop import LoopedTransformer, Score
from looptx_core.training.evaluate import inputs_and_targets
from looptx_core.training.loop_schedule import LoopSchedule

_GAIN_LIMIT = 4.0  # nats; a lone token can gain more, and squared errors would follow it


@dataclass
class LoopLoss:
    """What one batch gave. Losses in nats a token."""

    loss: Tensor
    """Scalar, for the trunk."""
    confidence_loss: Tensor
    """Scalar, for the confidence head; no gradient reaches the trunk."""
    deepest: Tensor
    """Scalar, detached: the mean loss at each sequence's last loop."""
    confidence_error: Tensor
    """Scalar, detached: mean |P(correct) - correct| over the read-outs."""
    mean_loops: float
    """Core iterations a token."""
    flops: float
    """Of the forward and backward passes: three times the forward ones."""
    restored: Tensor | None = None
    """Scalar, detached: the media's own loss on hidden rows, of which `loss` has its part."""
    by_labels: dict[str, Tensor] = field(default_factory=dict)
    """Scalars, detached, by medium: its encoder's own loss, of which `loss` has a share."""


@dataclass
class _ReadoutBatch:
    """States gathered for one pass through coda and head."""

    states: list[Tensor] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)

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
) -> LoopLoss:
    """The objective on a batch.

    tokens: (batch, length + 1) ids, each predicted from those before; or (batch, length) with
    `targets` of the same shape. ids: (batch,), the samples' numbers. documents: (batch,
    length), the document of each input token; attention stays within it. weights: (batch,
    length), what each target counts, about 1 in the mean over all batches; all 1 by default.
    media: of the placeholder tokens; those with hidden rows have an objective of their own.
    loss_prior: where a sequence is read after several loops, loop t counts t to this power.
    recompute: trade time for memory by running each loop again in the backward pass. progress: the
    share of the training that is done, by which the encoders' own losses fall.
    """
    inputs, wanted = inputs_and_targets(tokens, targets)
    batch, length = inputs.shape
    layout = model.layout(inputs, media)
    ctx = model.context(length, documents=documents, layout=layout)

    run = partial(checkpoint, model.step, use_reentrant=False) if recompute else model.step
    encoded = model.encode(media)
    state = embedding = model.embed(inputs, ctx, encoded=encoded)
    # The states of the loops that every sequence runs, before depths are known.
    first_loops = range(1, schedule.base + 1 if schedule.kind == "loss" else 1)
    before = [after for _, after in model.iterate(state, embedding, ctx, first_loops, run)]
    state = before[-1] if before else state
    depths = schedule.depths(
        step, ids, lambda by: _measured(model, state, schedule.base, wanted, ctx, by, weights)
    )

    # Deepest first: the sequences still in the loop are then a prefix, and no row is gathered.
    order = depths.argsort(descending=True, stable=True)
    depths = depths[order]
    on_device = order.to(state.device)
    state, embedding, ctx = state[on_device], embedding[on_device], ctx.rows(on_device)
    wanted = wanted[on_device]
    weights = None if weights is None else weights[on_device]
    before = [earlier[on_device] for earlier in before]
    read = _ReadoutBatch()
    core_rows = batch * len(before)

    def rows_at(loop: int) -> int:
        """How many sequences run a loop."""
        return int((depths >= loop).sum())

    def running(loop: int) -> int:
        return max(rows_at(loop), 1)  # a rank that is done keeps step with the others, unread

    deepest = _largest_over_ranks(int(depths[0]), state.device)
    further = range(len(before) + 1, deepest + 1)
    states = itertools.chain(
        enumerate(before, start=1),
        model.iterate(state, embedding, ctx, further, run, running),
    )
    for loop, after in itertools.islice(states, deepest):
        state, here = after, rows_at(loop)
        if loop > len(before):
            core_rows += len(state)
        first = {
            "last": int((depths > loop).sum()),
            "pair": int((depths > loop + 1).sum()),
            "all": 0,
        }[loss_at]
        read.add(state[first:here], list(range(first, here)), loop)
    scored = _score(model, read, wanted, weights, ctx)
    state = _with_what_others_use(model, state, media)
    result = _combine(model, scored, depths, loss_prior, keep_in_step=state, core_rows=core_rows)
    for name, items in (media or {}).items():
        medium = MEDIA[name]
        result.flops += 3 * medium.flops(model.config) * len(items.features)
        if items.hidden is not None:
            numbers = hidden_numbers(inputs, medium.token(model.config), items.hidden)
            numbers = numbers[on_device][torch.tensor(scored.rows, device=numbers.device)]
            own = medium.losses(model.heads()[name], scored.decoded, numbers, items)
            before_it = 0.0 if result.restored is None else result.restored
            result.loss, result.restored = result.loss + own.loss, before_it + own.loss.detach()
            result.confidence_loss = result.confidence_loss + own.confidence_loss
        if (by_labels := encoded[name].loss) is not None:
            share = medium.loss_weight(model.config, progress)
            result.loss = result.loss + share * by_labels
            result.by_labels[name] = by_labels.detach()
    return result


@torch.no_grad()
def _measured(
    model: LoopedTransformer,
    state: Tensor,
    loop: int,
    targets: Tensor,
    ctx: ForwardContext,
    by: str,
    weights: Tensor | None,
) -> Tensor:
    """What the choice of going deeper rests on, nats a token, (batch,)."""
    if by == "gain":
        return _average(model.confidence(state, loop).gain.float(), weights, 1)
    scored = model.score(model.coda_hidden(state, ctx).flatten(0, 1), targets.flatten())
    return _average(scored.loss.view(targets.shape), weights, 1)


@dataclass
class _Scored:
    """Read-outs with what became of them, each tensor (read-outs, length)."""

    rows: list[int]
    loops: list[int]
    score: Score
    logit: Tensor
    gain: Tensor
    weights: Tensor | None
    counted: float
    """Share of the targets that count."""
    decoded: Tensor
    """What the head read, (read-outs, length, d_model)."""


def _score(
    model: LoopedTransformer,
    read: _ReadoutBatch,
    targets: Tensor,
    weights: Tensor | None,
    ctx: ForwardContext,
) -> _Scored:
    states = torch.cat(read.states)
    rows = torch.tensor(read.rows, device=targets.device)
    targets = targets[rows]
    weights = None if weights is None else weights[rows]
    decoded = model.coda_hidden(states, ctx.rows(rows))
    read_out, wanted, counted = decoded.flatten(0, 1), targets.flatten(), None
    if weights is not None and bool((weights == 0).any()):
        # A product with the vocabulary only where a target counts, which no placeholder does.
        counted = weights.flatten() > 0
        read_out, wanted = read_out[counted], wanted[counted]
    scored = model.score(read_out, wanted)
    if counted is not None:
        nothing = scored.loss.new_zeros(targets.numel())
        scored = Score(*(nothing.masked_scatter(counted, part) for part in scored))
    confidence = model.confidence(states, torch.tensor(read.loops, device=states.device))
    return _Scored(
        read.rows,
        read.loops,
        Score(*(part.view(targets.shape) for part in scored)),
        confidence.logit.float(),
        confidence.gain.float(),
        weights,
        1.0 if counted is None else float(counted.float().mean()),
        decoded,
    )


def _combine(
    model: LoopedTransformer,
    read: _Scored,
    depths: Tensor,
    prior: float,
    keep_in_step: Tensor,
    core_rows: int,
) -> LoopLoss:
    batch, length = len(depths), read.score.loss.shape[1]
    rows, loops = torch.tensor(read.rows), torch.tensor(read.loops)
    share = loops.double() ** prior
    weight = share / torch.zeros(batch).double().index_add(0, rows, share)[rows] / batch
    losses = read.score.loss.detach()
    by_readout = _weigh(read.score.loss, read.weights).mean(1)
    loss = (by_readout * weight.to(by_readout)).sum() + 0.0 * keep_in_step.float().sum()

    judged = F.binary_cross_entropy_with_logits(read.logit, read.score.top, weight=read.weights)
    place = {key: index for index, key in enumerate(zip(read.rows, read.loops))}
    pairs = [(i, place[row, loop + 1]) for (row, loop), i in place.items()
             if (row, loop + 1) in place]  # fmt: skip
    if pairs:
        now, then = torch.tensor(pairs, device=by_readout.device).T
        seen = (losses[now] - losses[then]).clamp(-_GAIN_LIMIT, _GAIN_LIMIT)
        errors = F.mse_loss(read.gain[now], seen, reduction="none")
        judged = judged + _weigh(errors, read.weights, now).mean()
    else:
        judged = judged + 0.0 * read.gain.sum()

    cost = token_flops(model.config, length / 2)
    readouts = len(read.rows) / batch
    unread = readouts * (1 - read.counted) * 2 * model.config.d_model * model.config.vocab_size
    forward = (cost.at(core_rows / batch, readouts, readouts, readouts) - unread) * batch * length
    final = (depths[rows] == loops).to(by_readout.device)
    return LoopLoss(
        loss=loss,
        confidence_loss=judged,
        deepest=_average(losses[final], None if read.weights is None else read.weights[final]),
        confidence_error=_average(
            (read.logit.detach().sigmoid() - read.score.hit).abs(), read.weights
        ),
        mean_loops=core_rows / batch,
        flops=3 * forward,
    )


def _weigh(values: Tensor, weights: Tensor | None, rows: Tensor | slice = slice(None)) -> Tensor:
    """Values times what they count. The weights are normalised over the data and not over a
    batch, so that accumulation and ranks change nothing."""
    return values if weights is None else values * weights[rows]


def _average(values: Tensor, weights: Tensor | None, dim: int | None = None) -> Tensor:
    """The weighted mean over all values or along one dimension, to be read."""
    if weights is None:
        return values.mean(dim)
    return (values * weights).sum(dim) / weights.sum(dim).clamp(min=1e-9)


def _with_what_others_use(model: LoopedTransformer, state: Tensor, media: Media | None) -> Tensor:
    """The state, tied to the modules of media that only other ranks' batches may have: where ranks
    sum up their gradients, each needs one, if of zero."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if alone:
        return state
    both = (*model.encoders().items(), *model.heads().items())
    parts = [part for name, part in both if name not in (media or {})]
    for p in (p for part in parts for p in part.parameters() if p.requires_grad):
        state = state + 0.0 * p.sum().to(state.dtype)
    return state


def _largest_over_ranks(value: int, device: torch.device) -> int:
    """Every rank runs the same number of loops, as sharded weights are gathered at each."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shared = torch.tensor(value, device=device)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        return int(shared)
    return value
