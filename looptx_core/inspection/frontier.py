"""Quality against depth: every exit rule over its thresholds, fixed depths, and the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig
from looptx_core.inspection.survey import Survey
from looptx_core.model.flops import token_flops
from looptx_core.stopping.rule import RULES, Exit, exit_depths

_THRESHOLDS = 64
_CONFIDENCES = (0.7, 0.8, 0.9, 0.95, 0.99)  # with `auto`, beside each threshold on the gain


@dataclass(frozen=True)
class Point:
    """One rule at one threshold."""

    rule: str
    """An exit rule, fixed, change (relative step of the state) or oracle."""
    threshold: float
    """fixed: the depth. auto: the gain's. oracle: nats that a loop must be worth."""
    mean_loops: float
    loss: float
    """Nats a token."""
    accuracy: float
    flops: float
    """Forward, a token, with read-outs, what the rule looks at and, where it stops, how sure it
    is, against full depth's: a share."""
    confidence: float | None = None
    """auto: the confidence's threshold."""

    def settings(self, base: ExitSettings) -> ExitSettings:
        """What stores this rule with a model."""
        if self.rule == "auto":
            assert self.confidence is not None
            return replace(base, rule="auto", gain=self.threshold, confidence=self.confidence)
        return replace(base, rule=self.rule, **{self.rule: self.threshold})  # type: ignore[arg-type]


def rule_depths(survey: Survey, settings: ExitSettings) -> Tensor:
    """Depths by the rule that is stored in the settings, (tokens,)."""
    own = Exit(settings.min_loops, survey.loops, settings, settings.rule)
    return own.depths(survey.signals(settings))


def frontier(
    survey: Survey, settings: ExitSettings, config: ModelConfig, context: float
) -> list[Point]:
    """Every rule at thresholds spread over its signal.

    settings: their calibration counts. context: tokens that a token attends to, for the FLOPs.
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
        return Point(
            rule=rule,
            threshold=threshold,
            mean_loops=mean,
            loss=float(survey.loss.gather(0, index).double().mean()),
            accuracy=float(survey.hit.gather(0, index).double().mean()),
            flops=cost.at(mean, *own.passes(mean)) / full,
            confidence=confidence,
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
                # Stop where a loop changes the state by less; such a rule is not stored.
                depth = exit_depths(values < threshold, settings.min_loops)
                points.append(point(name, threshold, no_rule, depth))
    for threshold, sure in itertools.product(_spread(signals["gain"], 8), _CONFIDENCES):
        own = exit_by("auto", gain=threshold, confidence=sure)
        points.append(point("auto", threshold, own, own.depths(signals), sure))
    steps = torch.arange(1, survey.loops + 1)[:, None]
    for price in (0.0, *torch.logspace(-4, 0.5, _THRESHOLDS).tolist()):
        cheapest = (survey.loss + price * steps).argmin(0) + 1
        points.append(point("oracle", price, no_rule, cheapest))
    return points


def choose(points: Sequence[Point], full_loss: float, increase: float) -> Point | None:
    """The stored rule that costs least within a relative increase of the loss; None if none is."""
    within = [p for p in points if p.rule in RULES and p.loss <= full_loss * (1 + increase)]
    return min(within, key=lambda p: (p.flops, p.loss), default=None)


def cheapest_fixed(points: Sequence[Point], full_loss: float, increase: float) -> Point:
    """The smallest fixed depth within a relative increase of the loss."""
    fixed = [p for p in points if p.rule == "fixed"]
    return next((p for p in fixed if p.loss <= full_loss * (1 + increase)), fixed[-1])


def _spread(values: Tensor, count: int = _THRESHOLDS) -> Iterator[float]:
    """Thresholds at quantiles of a signal before the last loop, to four digits."""
    finite = values[:-1][values[:-1].isfinite()].double()
    if not len(finite):
        return
    finite = finite.sort().values
    places = torch.linspace(0, len(finite) - 1, count).long()
    yield from dict.fromkeys(float(f"{v:.4g}") for v in finite[places].tolist())
