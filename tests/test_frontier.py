"""Which exit is picked: rules over their thresholds, and what their loss may be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig
from looptx_core.inspection.frontier import (
    Point,
    cheapest_fixed,
    choose,
    frontier,
    rule_depths,
    undecided,
)
from looptx_core.inspection.survey import Survey
from looptx_core.training.evaluate import LoopEvaluation


def small_survey(times: int = 1) -> Survey:
    """Three loops, two tokens: the first is done at once, the second needs the second loop.

    times: so often.
    """
    loss = torch.tensor([[1.0, 3.0], [1.0, 1.0], [1.0, 1.0]])
    gain = torch.tensor([[0.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    hit = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    kl = torch.tensor([[torch.inf, torch.inf], [0.0, 1.0], [0.0, 0.0]])
    logit = torch.tensor([[3.0, -3.0], [3.0, 3.0], [3.0, 3.0]])
    odds = torch.tensor([[2.2, -1.4], [2.2, 2.2], [2.2, 2.2]])
    sharp = torch.tensor([[0.9, 0.2], [0.9, 0.9], [0.9, 0.9]])
    loss, gain, hit, kl, logit, odds, sharp = (
        part.repeat(1, times) for part in (loss, gain, hit, kl, logit, odds, sharp)
    )
    evaluation = LoopEvaluation(
        tokens=2 * times, loss=loss.sum(1), correct=hit.sum(1), norm=torch.zeros(3), logit=logit,
        hit=hit, gain=gain, change=kl, token_loss=loss, top_log_odds=odds,
    )  # fmt: skip
    return Survey(evaluation, {"kl": kl, "entropy": 1 - sharp, "maxprob": sharp})


def test_frontier_by_hand():
    survey, config = small_survey(), ModelConfig(max_loops=3)
    settings = ExitSettings(gain=0.5)
    assert rule_depths(survey, replace(settings, rule="gain")).tolist() == [1, 2]
    assert rule_depths(survey, replace(settings, rule="kl", kl=0.5)).tolist() == [2, 3]
    points = frontier(survey, settings, config, context=64)
    fixed = [(p.threshold, p.mean_loops, p.loss) for p in points if p.rule == "fixed"]
    assert fixed == [(1, 1, 2.0), (2, 2, 1.0), (3, 3, 1.0)]
    assert [p.accuracy for p in points if p.rule == "fixed"] == [0.5, 1, 1]
    assert {p.confidence for p in points if p.rule == "auto"} == {0.7, 0.8, 0.9, 0.95, 0.99}
    assert cheapest_fixed(points, full_loss=1.0, increase=0.005).threshold == 2
    assert cheapest_fixed(points, full_loss=0.5, increase=0.005).threshold == 3  # as none is
    assert next(p.flops for p in points if p.rule == "fixed" and p.threshold == 3) == 1
    best = min(
        (p for p in points if p.rule == "oracle" and p.loss == 1), key=lambda p: p.mean_loops
    )
    assert best.mean_loops == 1.5
    many = frontier(small_survey(500), settings, config, context=64)
    chosen = choose(many, full_loss=1.0, increase=0.005)
    assert (
        chosen.loss == 1
        and chosen.mean_loops == 1.5
        and chosen.rule in ("auto", "gain", "confidence")
    )
    assert rule_depths(survey, chosen.settings(settings)).tolist() == [1, 2]
    # No token stops at a loop that training did not read.
    late = replace(settings, min_loops=2)
    assert rule_depths(survey, replace(late, rule="gain")).tolist() == [2, 2]
    later = frontier(survey, late, config, context=64)
    assert min(p.mean_loops for p in later if p.rule not in ("fixed", "oracle", "change")) == 2
    # A rule that reads the vocabulary after each loop pays for it.
    probable = next(p for p in points if p.rule == "maxprob" and p.mean_loops == 1.5)
    hidden = next(p for p in points if p.rule == "gain" and p.mean_loops == 1.5)
    assert probable.loss == hidden.loss and probable.flops > hidden.flops


def test_an_exit_is_picked_by_what_its_loss_may_be():
    def point(threshold, loops, loss, highest, rule="gain"):
        return Point(rule, threshold, loops, loss, 1.0, loops / 3, None, highest)

    sure, unsure = point(0.1, 2.5, 1.0, 1.004), point(0.2, 2.0, 1.002, 1.01)
    lucky = point(0.3, 1.5, 0.99, 1.004)  # after one that fails, so by chance
    points = [lucky, sure, point(0.0, 3.0, 1.0, 1.0), unsure, point(0.4, 1.2, 1.1, 1.2)]
    assert choose(points, full_loss=1.0, increase=0.005) is sure
    assert choose(points, full_loss=1.0, increase=0.01) is lucky  # as no earlier one fails
    # Of the 0.008 above the loss of `unsure` a thousandth is of the token that was not seen.
    found, tokens = undecided(points, sure, full_loss=1.0, increase=0.005, tokens=1000)
    times = tokens / 1000
    assert found is unsure and 0.007 / times**0.5 + 0.001 / times == pytest.approx(0.003, rel=1e-3)
    assert undecided(points, lucky, full_loss=1.0, increase=0.005, tokens=1000) is None
    # The other rules have sequences of their own.
    other = point(0.5, 1.8, 1.0, 1.003, "entropy")
    assert choose([*points, other], full_loss=1.0, increase=0.005) is other


def test_few_tokens_and_rare_losses_keep_full_depth():
    settings, config = ExitSettings(), ModelConfig(max_loops=3)

    def chosen(survey):
        points = frontier(survey, settings, config, context=64)
        return choose(points, full_loss=1.0, increase=0.005)

    assert chosen(small_survey()).mean_loops == 3  # two tokens show nothing
    survey = small_survey(500)
    assert chosen(survey).mean_loops == 1.5
    survey.loss[0, ::100] += 0.4  # one of fifty that stop at once: 0.4 % more, and up to 0.7 %
    assert chosen(survey).mean_loops > 1.5
