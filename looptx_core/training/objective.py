"""The loss of a looped model, and of its confidence head, from one forward pass.

Each sequence runs to its own depth (`loop_schedule`) and is read out at some of its loops; its
loss is the mean over these read-outs, so that depth 1 and depth 10 weigh the same. `pair` reads
a sequence's last two loops: with depths drawn broadly every loop is supervised under the fixed
prior that the draw implies, and the gain of one more loop is seen at each pair.

The confidence head learns from the very same read-outs: whether the top token was right, and by
how much the next loop lowered the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from looptx_core.model.block import Surroundings
from looptx_core.model.flops import token_flops
from looptx_core.model.loop import LoopedTransformer
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


@dataclass
class _Readouts:
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
    documents: Tensor | None = None,
    loss_at: str = "pair",
    recompute: bool = False,
) -> LoopLoss:
    """The objective on a batch.

    tokens: (batch, length + 1) ids. ids: (batch,), the samples' numbers. documents: (batch,
    length), the document of each input token; attention stays within it. recompute: trade time
    for memory by running each loop again in the backward pass.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    batch, length = inputs.shape
    around = model.surroundings(length, documents=documents)

    def iterate(state: Tensor, embedding: Tensor, loop: int, around: Surroundings) -> Tensor:
        if recompute:
            return checkpoint(model.step, state, embedding, loop, around, use_reentrant=False)
        return model.step(state, embedding, loop, around)

    drawn, explores = schedule.draw(step, ids)
    state = embedding = model.encode(inputs, around)
    parts: list[_Scored] = []
    done = core_rows = 0

    if schedule.kind == "loss":
        for loop in range(1, schedule.base + 1):
            state = iterate(state, embedding, loop, around)
        done, core_rows = schedule.base, batch * schedule.base
        base = _Readouts([state], list(range(batch)), [schedule.base] * batch)
        parts.append(_score(model, base, targets, around))
        losses, gains = (x.detach().mean(1).cpu() for x in (parts[0].losses, parts[0].gain))
        deeper = schedule.goes_deeper(losses, gains, explores)
        depths = torch.where(deeper, drawn, schedule.base)
    else:
        depths = drawn

    # Deepest first: the sequences still in the loop are then a prefix, and no row is gathered.
    order = depths.argsort(descending=True, stable=True)
    depths = depths[order]
    order_on_device = order.to(state.device)
    state, embedding = state[order_on_device], embedding[order_on_device]
    ordered = around.rows(order_on_device)
    later = _Readouts()
    last = _largest_over_ranks(int(depths[0]), state.device)
    for loop in range(done + 1, last + 1):
        here = int((depths >= loop).sum())
        running = max(here, 1)  # a rank that is done keeps step with the others, unread
        prefix = slice(running)
        state = iterate(state[prefix], embedding[prefix], loop, ordered.rows(prefix))
        core_rows += running
        first = {
            "last": int((depths > loop).sum()),
            "pair": int((depths > loop + 1).sum()),
            "all": 0,
        }[loss_at]
        later.add(state[first:here], order[first:here].tolist(), loop)
    if later.rows:
        parts.append(_score(model, later, targets, around))
    return _combine(model, parts, order, depths, loss_at, keep_in_step=state, core_rows=core_rows)


@dataclass
class _Scored:
    """Read-outs with what became of them, each tensor (read-outs, length)."""

    rows: list[int]
    loops: list[int]
    losses: Tensor
    correct: Tensor
    logit: Tensor
    gain: Tensor


def _score(
    model: LoopedTransformer, read: _Readouts, targets: Tensor, around: Surroundings
) -> _Scored:
    states = torch.cat(read.states)
    rows = torch.tensor(read.rows, device=targets.device)
    targets = targets[rows]
    logits = model.head(model.decode(states, around.rows(rows))).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    confidence = model.confidence(states, torch.tensor(read.loops, device=states.device))
    return _Scored(
        read.rows,
        read.loops,
        losses.view(targets.shape),
        (logits.detach().argmax(-1) == targets).float(),
        confidence.logit.float(),
        confidence.gain.float(),
    )


def _combine(
    model: LoopedTransformer,
    parts: list[_Scored],
    order: Tensor,
    depths: Tensor,
    loss_at: str,
    keep_in_step: Tensor,
    core_rows: int,
) -> LoopLoss:
    rows = [row for part in parts for row in part.rows]
    loops = [loop for part in parts for loop in part.loops]
    losses = torch.cat([part.losses for part in parts])
    correct = torch.cat([part.correct for part in parts])
    logit = torch.cat([part.logit for part in parts])
    gain = torch.cat([part.gain for part in parts])
    batch, length = len(depths), losses.shape[1]

    depth_of = dict(zip(order.tolist(), depths.tolist()))
    final = torch.tensor([depth_of[row] == loop for row, loop in zip(rows, loops)])
    weight = final.float() if loss_at == "last" else torch.ones(len(rows))
    per_row = torch.zeros(batch).index_add(0, torch.tensor(rows), weight)
    weight = (weight / per_row[rows] / batch).to(losses.device)
    by_readout = losses.mean(1)
    loss = (by_readout * weight).sum() + 0.0 * keep_in_step.float().sum()

    judged = F.binary_cross_entropy_with_logits(logit, correct)
    place = {key: index for index, key in enumerate(zip(rows, loops))}
    pairs = [(i, place[row, loop + 1]) for i, (row, loop) in enumerate(zip(rows, loops))
             if (row, loop + 1) in place]  # fmt: skip
    if pairs:
        now, then = torch.tensor(pairs, device=losses.device).T
        seen = (losses[now] - losses[then]).detach().clamp(-_GAIN_LIMIT, _GAIN_LIMIT)
        judged = judged + F.mse_loss(gain[now], seen)
    else:
        judged = judged + 0.0 * gain.sum()

    cost = token_flops(model.config, length / 2)
    tokens = batch * length
    forward = cost.at(core_rows / batch, len(rows) / batch, len(rows) / batch) * tokens
    return LoopLoss(
        loss=loss,
        confidence_loss=judged,
        deepest=by_readout.detach()[final.to(losses.device)].mean(),
        confidence_error=(logit.detach().sigmoid() - correct).abs().mean(),
        mean_loops=core_rows / batch,
        flops=3 * forward,
    )


def _largest_over_ranks(value: int, device: torch.device) -> int:
    """Every rank runs the same number of loops, as sharded weights are gathered at each."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shared = torch.tensor(value, device=device)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        return int(shared)
    return value
