"""Calibration: what the heads say becomes true, on data that is made up."""

from __future__ import annotations

import math

import pytest
import torch

from looptx_core.config.generation import ExitSettings
from looptx_core.machine.device import on_best_device
from looptx_core.model.confidence import top_log_odds
from looptx_core.stopping.calibration import calibrated, reported_confidence
from looptx_core.training.calibration import calibrate, fit_confidence, fit_gain, fit_odds
from looptx_core.training.evaluate import LoopEvaluation
from looptx_core.training.metrics import auroc, calibration_error

pytestmark = pytest.mark.fast


def test_the_heads_confidence_becomes_true() -> None:
    """Logits that are three times too sure of a Bernoulli, and of all by one more."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(20_000, generator=generator)
    hit = (torch.rand(20_000, generator=generator) < true.sigmoid()).float()
    said = 3 * (true + 1)
    temperature, offset = fit_confidence(said, hit)
    assert (temperature, offset) == pytest.approx((3, -1), rel=0.05)
    settings = ExitSettings(temperature=temperature, confidence_offset=offset)
    sure, _ = calibrated(said, said, said, 1, settings)
    assert calibration_error(sure, hit) < 0.01 < 0.2 < calibration_error(said.sigmoid(), hit)
    # Of a head that tells nothing, or the opposite, the share of hits is left.
    for nothing in (torch.zeros(20_000), -said):
        temperature, offset = fit_confidence(nothing, hit)
        assert temperature == pytest.approx(math.e**2) and math.isfinite(offset)
    # A head that is never wrong has no slope either: the steepest is taken.
    assert fit_confidence(0.01 * (2 * hit - 1), hit)[0] == pytest.approx(math.e**-2)


def test_what_may_not_stop_is_not_calibrated_on() -> None:
    generator = torch.Generator().manual_seed(0)
    logit, sharp, gain, each = torch.randn(4, 3, 500, generator=generator)
    change = torch.rand(3, 500, generator=generator) + 0.1
    hit = (torch.rand(3, 500, generator=generator) < 0.5).float()
    hit[0] = 0  # by a head that was never asked there

    def some(loops: slice) -> LoopEvaluation:
        sums = [part[loops].double().sum(1) for part in (each, hit, sharp)]
        parts = [part[loops] for part in (logit, hit, gain, change, each, sharp)]
        return LoopEvaluation(500, *sums, *parts)

    late = calibrate(ExitSettings(min_loops=2), some(slice(3)))
    read = calibrate(ExitSettings(), some(slice(1, 3)))
    assert (late.temperature, late.stated) == (read.temperature, read.stated)
    assert late.confidence_offset == read.confidence_offset != 0
    # Where fewer loops are looked at, by the last of them.
    alone = calibrate(ExitSettings(min_loops=3), some(slice(1, 2)))
    assert all(map(math.isfinite, (alone.temperature, *alone.stated)))


def test_the_stated_confidence_weighs_head_and_readout() -> None:
    """Both tell a part of the truth, the read-out twice as much."""
    generator = torch.Generator().manual_seed(0)
    logit, sharp = torch.randn(2, 40_000, generator=generator)
    true = torch.sigmoid(0.3 + 0.5 * logit + sharp)
    hit = (torch.rand(40_000, generator=generator) < true).float()
    assert fit_odds(hit, logit, sharp) == pytest.approx((0.3, 0.5, 1.0), abs=0.04)
    told = reported_confidence(logit, sharp, ExitSettings(stated=(0.3, 0.5, 1.0)))
    assert torch.allclose(told, true)
    best, worst = auroc(told, hit), max(auroc(logit, hit), auroc(sharp, hit))
    assert best > worst + 0.01
    # Where no answer is wrong, nothing runs away.
    assert max(map(abs, fit_odds(torch.ones(40_000), logit, sharp))) < 20


def test_the_log_odds_of_the_best_by_hand() -> None:
    logs = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.0, 1.0]]).log()
    odds = top_log_odds(logs[:, None])  # of one token each
    assert odds.shape == (3, 1)
    odds = odds[:, 0]
    assert odds[:2].tolist() == pytest.approx([math.log(3), 0.0], abs=1e-6)
    assert 15 < odds[2] < 17


def test_predicted_gains_become_true_ones() -> None:
    """A loop whose gain goes with the prediction, one whose goes with the change, one of noise
    alone, and one that takes back."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(5, 40_000, generator=generator)
    change = torch.randn(5, 40_000, generator=generator).exp()
    gains = [0.2 * (0.5 * predicted[0]).exp(), 0.1 * change[1] ** 0.7]
    gains += [torch.full((40_000,), 0.01), torch.full((40_000,), -0.05)]
    drops = torch.stack(gains) + 0.2 * torch.randn(4, 40_000, generator=generator)
    loss = torch.cat([torch.full((1, 40_000), 9.0), 9.0 - drops.cumsum(0)])
    slope, power, offset = fit_gain(predicted, change, loss)
    assert slope[:2] == pytest.approx((0.5, 0.0), abs=0.05)
    assert power[:2] == pytest.approx((0.0, 0.7), abs=0.05)
    assert max(map(abs, (slope[2], power[2]))) < 0.3  # whose standard errors are 0.1
    assert (slope[3], power[3]) == (0.0, 0.0)
    assert offset[:2] == pytest.approx((math.log(0.2), math.log(0.1)), abs=0.06)
    assert offset[3] == pytest.approx(math.log(1e-6))
    # In other units of the head and of the change the same gains are predicted.
    scaled = fit_gain(4 * predicted, change**2, loss)
    assert scaled[0] == pytest.approx([part / 4 for part in slope], abs=1e-6)
    assert scaled[1] == pytest.approx([part / 2 for part in power], abs=1e-6)
    assert scaled[2] == pytest.approx(offset, abs=1e-5)
    told = ExitSettings(gain_slope=slope, gain_power=power, gain_offset=offset)
    for loop in (1, 2):
        logit = torch.zeros(40_000)
        words = (logit, predicted[loop - 1], change[loop - 1])
        nats = calibrated(*words, loop, told)[1]
        assert (nats / gains[loop - 1]).log().abs().mean() < 0.05
        single = calibrated(*(float(part[0]) for part in words), loop, told)[1]
        assert single == pytest.approx(float(nats[0]), rel=1e-5)


def test_the_calibration_error_is_that_of_its_definition() -> None:
    hit = torch.tensor([0.0, 1.0] * 60)
    assert calibration_error(torch.full((120,), 0.5), hit) == pytest.approx(0.0, abs=0.02)
    assert calibration_error(torch.full((120,), 0.9), hit) == pytest.approx(0.4, abs=0.02)
    assert calibration_error(hit, hit) == 0.0


def test_a_measurement_too_large_for_the_gpu_is_made_beside_it() -> None:
    model, seen = torch.nn.Linear(2, 2), []

    def work() -> str:
        seen.append(model.weight.device)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert on_best_device(model, work) == "done" and len(seen) == 2
    assert model.weight.device == seen[1] == torch.device("cpu")
    with pytest.raises(ZeroDivisionError):
        on_best_device(model, lambda: 1 // 0)
