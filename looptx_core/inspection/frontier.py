"""Quality against depth: every exit rule over its thresholds, fixed depths, and an oracle.

A rule is picked as in CALM (arXiv 2207.07061), by fixed-sequence testing of Learn then Test (arXiv
2110.01052). The thresholds of a rule are gone through from deep to shallow, and the last one counts
before the first whose increase of the loss may exceed the target. What it may be is the upper
confidence bound of the mean difference between a token's losses at the rule's depth and at full
depth. The bound takes the mean for normally distributed; losses have no limit, so that exact bounds
do not apply. Tokens that lose much by stopping are rare, and a small sample may have none of them.
So one more that loses a nat is always counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig
from looptx_core.inspection.survey import Survey
from looptx_core.model.flops import token_flops
from looptx_core.stopping.rule import RULES, Exit, exit_depths

_THRESHOLDS = 64
_CONFIDENCES = (0.7, 0.8, 0.9, 0.95, 0.99)  # `auto` combines each with each threshold on the gain
_RISK = 0.05  # that the picked rule's increase exceeds the target, if means are normal
_SEQUENCES = len(RULES) - 1 + len(_CONFIDENCES)  # of thresholds; the risk is shared by them
_BOUND = NormalDist().inv_cdf(1 - _RISK / _SEQUENCES)  # standard errors
_UNSEEN = 1.0  # nats that one more token is taken to lose by stopping early


@dataclass(frozen=True)
class Point:
    """One rule at one threshold."""

    rule: str
    """An exit rule, fixed, change (relative step of the state) or oracle."""
    threshold: float
    """fixed: the depth. auto: the gain's threshold. oracle: nats that a loop must gain."""
    mean_loops: float
    loss: float
    """Nats a token."""
    accuracy: float
    flops: float
    """Forward FLOPs of a token, its readouts and confidence head included, over full depth's."""
    confidence: float | None = None
    """auto: the confidence's threshold; None for the others."""
    highest_loss: float = math.inf
    """Upper confidence bound of the loss: full depth's, and the most that this rule may add."""

    def settings(self, base: ExitSettings) -> ExitSettings:
        """Exit settings that store this rule with a model."""
        if self.rule == "auto":
            assert self.confidence is not None
            return replace(base, rule="auto", gain=self.threshold, confidence=self.confidence)
        return replace(base, rule=self.rule, **{self.rule: self.threshold})  # type: ignore[arg-type]


def rule_depths(survey: Survey, settings: ExitSettings) -> Tensor:
    """The depth of each token by the settings' rule, (tokens,)."""
    own = Exit(settings.min_loops, survey.loops, settings, settings.rule)
    return own.depths(survey.signals(settings))


def frontier(
    survey: Survey, settings: ExitSettings, config: ModelConfig, context: float
) -> list[Point]:
    """Every rule at thresholds spread over its signal's values.

    settings: only their calibration and `min_loops` matter. context: how many tokens a token
    attends to, for the FLOPs.
    """
    cost = token_flops(config, context)
    full = cost.at(survey.loops)

    def exit_by(rule: str | None, **thresholds: float) -> Exit:
        own = replace(settings, **thresholds)  # type: ignore[arg-type]
        return Exit(settings.min_loops, survey.loops, own, rule)

    def point(
        rule: str, threshold: float, own: Exit, depth: Tensor, confidence: float | None = None
    ) -> Point:
        index = depth[None] - 1
        mean = float(depth.double().mean())
        losses = survey.loss.gather(0, index)[0].double()
        loss = float(losses.mean())
        unseen = _UNSEEN / len(losses) if mean < survey.loops else 0.0
        return Point(
            rule=rule,
            threshold=threshold,
            mean_loops=mean,
            loss=loss,
            accuracy=float(survey.hit.gather(0, index).double().mean()),
            flops=cost.at(mean, *own.passes(mean)) / full,
            confidence=confidence,
            highest_loss=loss + _BOUND * standard_error(losses - survey.loss[-1]) + unseen,
        )

    no_rule = exit_by(None)
    everyone = torch.ones(survey.loss.shape[1], dtype=torch.long)
    points = [point("fixed", t, no_rule, t * everyone) for t in range(1, survey.loops + 1)]
    signals = survey.signals(settings)
    for name, values in signals.items():
        for threshold in _spread(values):
            if name in RULES:
                own = exit_by(name, **{name: threshold})
                points.append(point(name, threshold, own, own.depths(signals)))
            else:
                # `change` is no stored rule: stop where a loop changes the state by less.
                depth = exit_depths(values < threshold, settings.min_loops)
                points.append(point(name, threshold, no_rule, depth))
    for threshold, confidence in itertools.product(_spread(signals["gain"], 8), _CONFIDENCES):
        own = exit_by("auto", gain=threshold, confidence=confidence)
        points.append(point("auto", threshold, own, own.depths(signals), confidence))
    steps = torch.arange(1, survey.loops + 1)[:, None]
    for price in (0.0, *torch.logspace(-4, 0.5, _THRESHOLDS).tolist()):
        cheapest = (survey.loss + price * steps).argmin(0) + 1
        points.append(point("oracle", price, no_rule, cheapest))
    return points


def choose(points: Sequence[Point], full_loss: float, increase: float) -> Point | None:
    """The cheapest rule of `RULES` that is shown to be within a relative increase of the loss.

    None if none is. points: of one survey, `frontier`'s.
    """
    limit = full_loss * (1 + increase)
    ours = sorted((p for p in points if p.rule in RULES), key=lambda p: -p.mean_loops)
    within = [
        point
        for key in dict.fromkeys((p.rule, p.confidence) for p in ours)
        for point in itertools.takewhile(
            lambda p: p.highest_loss <= limit,
            (p for p in ours if (p.rule, p.confidence) == key),
        )
    ]
    return min(within, key=lambda p: (p.flops, p.loss), default=None)


def undecided(
    points: Sequence[Point], picked: Point | None, full_loss: float, increase: float, tokens: int
) -> tuple[Point, int] | None:
    """The cheapest rule that may be within the increase and is not shown to be.

    Its measured increase is at most half of the allowed one. tokens: how many the points are of.
    Returns it, and how many would show it; None if there is no rule that is cheaper than the picked
    one.
    """
    limit = full_loss * (1 + increase)
    open_ = [
        p for p in points
        if p.rule in RULES and (picked is None or p.flops < picked.flops)
        and p.loss <= full_loss * (1 + increase / 2) and p.loss < limit < p.highest_loss
    ]  # fmt: skip
    if not open_:
        return None
    cheapest = min(open_, key=lambda p: p.flops)
    room, unseen = limit - cheapest.loss, _UNSEEN / tokens
    error = cheapest.highest_loss - cheapest.loss - unseen
    # Of k times as many: error / sqrt(k) + unseen / k = room.
    root = (error + math.sqrt(error**2 + 4 * room * unseen)) / (2 * room)
    return cheapest, math.ceil(tokens * root**2)


def standard_error(values: Tensor) -> float:
    """Of the mean of values, (tokens,)."""
    return float(values.double().std(correction=0)) / math.sqrt(max(1, len(values) - 1))


def cheapest_fixed(points: Sequence[Point], full_loss: float, increase: float) -> Point:
    """The smallest fixed depth whose relative increase of the loss is allowed."""
    fixed = [p for p in points if p.rule == "fixed"]
    return next((p for p in fixed if p.loss <= full_loss * (1 + increase)), fixed[-1])


def _spread(values: Tensor, count: int = _THRESHOLDS) -> Iterator[float]:
    """Thresholds at quantiles of a signal before the last loop, to four digits."""
    finite = values[:-1][values[:-1].isfinite()].double()
    if not len(finite):
        return
    finite = finite.sort().values
    index = torch.linspace(0, len(finite) - 1, count).long()
    yield from dict.fromkeys(float(f"{v:.4g}") for v in finite[index].tolist())
