"""Whether one loop of a converted model is its source, and what a second one costs untrained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looptx_core.conversion.pretrained import Looping
from looptx_core.errors import DataError, LooptxError
from looptx_core.model.injection import Injection
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.evaluate import LoopEvaluation, evaluate_all

MOST_DIFFERENCE = 1e-4
"""Of logits, relative to the largest. States of a norm of 24,800 are usual, so that an absolute
bound would judge the rounding alone."""


class Span(NamedTuple):
    """Layers first to end-1 as a core."""

    first: int
    end: int
    cost: float
    """By which a second pass of these layers, untrained, raises the loss; nats a token."""

    @property
    def name(self) -> str:
        """As `core` is given."""
        return f"{self.first}:{self.end}"

    def to_dict(self) -> dict[str, object]:
        return {"core": self.name, "second_loop_cost": self.cost}


class HalfSteps(NamedTuple):
    """By what half steps of the core, untrained, change the loss; nats a token."""

    cost: float
    error: float
    """Standard error of the cost."""

    @property
    def pay(self) -> bool:
        """Whether they lower the loss by more than two errors."""
        return self.cost < -2 * self.error


@torch.no_grad()
def logit_difference(model: LoopedTransformer, source: nn.Module, tokens: Tensor) -> float:
    """max |ours - source| / max |source| at one loop. tokens: (rows, length).

    Raises `DataError` where it is over `MOST_DIFFERENCE`, or the source's logits are no numbers
    or all zero.
    """
    gaps, sizes = [], []
    for row in tokens.split(1):
        theirs = source(row).logits
        gaps.append((model(row, 1).logits - theirs).abs().max())
        sizes.append(theirs.abs().max())
    largest = torch.stack(sizes).max().item()  # unlike Python's max, it does not pass over NaN
    if not 0 < largest < math.inf:
        raise DataError(
            f"the source's largest logit is {largest}; its weights are damaged, so copy it again"
        )
    found = torch.stack(gaps).max().item() / largest
    if not found <= MOST_DIFFERENCE:
        raise DataError(
            f"one loop is not the source: its logits differ by {found:.1e} of the largest, and "
            f"{MOST_DIFFERENCE:.0e} is the limit; the source has a part that a looped model has "
            "not, so take another model"
        )
    return found


@torch.no_grad()
def second_loop_costs(model: LoopedTransformer, tokens: Tensor) -> list[Span]:
    """What a second pass of some layers costs without training, for several spans of the depth.

    tokens: (rows, length). The span of `auto` is among them.
    """
    layers: list[nn.Module] = [*model.prelude, *model.core, *model.coda]
    ctx = model.context(tokens.shape[1])
    states = [model.embedding(tokens)]
    for layer in layers:
        states.append(layer(states[-1], ctx))

    def loss(state: Tensor) -> float:
        logits = model.head(model.norm(state))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

    def again(first: int, end: int) -> float:
        state = states[end]
        for layer in layers[first:end] + layers[end:]:
            state = layer(state, ctx)
        return loss(state)

    count, plain = len(layers), loss(states[-1])
    shares = ((0.2, 0.4), (0.3, 0.5), (0.5, 0.7), (0.6, 0.8), (0.25, 0.75))
    spans = {Looping("auto").span(count)} if count > 1 else set()
    spans |= {(round(a * count), round(b * count)) for a, b in shares}
    return [Span(*span, again(*span) - plain) for span in sorted(spans) if span[0] < span[1]]


@contextmanager
def half_steps(model: LoopedTransformer) -> Iterator[None]:
    """Later loops of the model take its core in half steps meanwhile."""
    kept = model.injection
    model.injection = Injection(replace(model.config, injection="half_steps"))
    try:
        yield
    finally:
        model.injection = kept


def with_half_steps(
    model: LoopedTransformer, batches: Iterable[Mapping[str, Tensor]]
) -> tuple[LoopEvaluation, HalfSteps]:
    """The model with a second loop in half steps: losses of both loops, and what they cost."""
    with half_steps(model):
        found = evaluate_all(model, batches, 2)
    more = (found.token_loss[1] - found.token_loss[0]).double()
    return found, HalfSteps(more.mean().item(), more.std().item() / math.sqrt(len(more)))


def transformers_or_none(open_source: Callable[[], nn.Module]) -> nn.Module | None:
    """The source by transformers, without its progress bars; None where that is not installed.

    Raises `DataError` for a source that transformers refuses.
    """
    try:
        from transformers.utils import logging
    except ModuleNotFoundError:
        return None
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return open_source()
    except (LooptxError, MemoryError):
        raise
    except Exception as error:  # transformers' checks of a configuration raise errors of many kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"transformers does not open the source: {reason}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
