"""The exit rules by hand, and which one a request gets."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.errors import UsageError
from looptx_core.stopping.calibration import calibrated
from looptx_core.stopping.resolve import resolve_exit
from looptx_core.stopping.rule import Exit, ExitSignals

pytestmark = pytest.mark.fast

SETTINGS = ExitSettings(confidence=0.93, gain=0.1, kl=1.5, temperature=2.0)


def test_each_rule_by_hand():
    sure = torch.tensor([0.5, 0.9, 0.95])
    gain = torch.tensor([0.5, 0.5, 0.0])
    even, peaked = [0.0, 0.0], [math.log(9.0), 0.0]  # probabilities 1/2, 1/2 and 9/10, 1/10
    logits = torch.tensor([even, peaked, peaked])
    previous = torch.tensor([even, even, peaked])
    read = ExitSignals(sure, gain, logits, previous)
    at = ExitSettings(confidence=0.9, gain=0.01, kl=0.3, entropy=0.4, maxprob=0.85)

    def stops(name, **changes):
        return Exit(1, 10, replace(at, **changes), name).stops(1, read).tolist()

    assert stops("confidence") == [False, True, True]
    assert stops("gain") == [False, False, True]
    assert stops("auto") == [False, True, True]
    assert stops("auto", confidence=0.99) == [False, False, True]
    # KL(9/10, 1/10 || 1/2, 1/2) = ln 2 - 0.325083 = 0.368064; the other way round it is 0.510826.
    assert stops("kl") == [True, False, True]
    assert stops("kl", kl=0.3680) == [True, False, True]
    assert stops("kl", kl=0.3681) == [True, True, True]
    # Of many rows and tokens, each by its own vocabulary.
    square = ExitSignals(sure, gain, logits.repeat(2, 1, 1), previous.repeat(2, 1, 1))
    assert Exit(1, 10, at, "kl").stops(1, square).tolist() == [[True, False, True]] * 2
    first = read._replace(previous=None)
    assert Exit(1, 10, at, "kl").stops(1, first).tolist() == [False] * 3
    # Entropies: 0.693147 and 0.325083.
    assert stops("entropy") == [False, True, True]
    assert stops("entropy", entropy=0.325) == [False] * 3
    assert stops("maxprob") == [False, True, True]
    assert stops("maxprob", maxprob=0.91) == [False] * 3


def test_resolve_exit():
    def resolve(**options):
        return resolve_exit(SETTINGS, GenerationOptions(**options), ModelConfig(max_loops=10))

    own = resolve()
    assert (own.rule, own.min_loops, own.max_loops, own.settings) == ("auto", 1, 10, SETTINGS)
    late = replace(SETTINGS, min_loops=3)
    for asked, least in ({}, 3), ({"min_loops": 1}, 1), ({"max_loops": 2}, 2):
        assert (
            resolve_exit(late, GenerationOptions(**asked), ModelConfig(max_loops=10)).min_loops
            == least
        )
    assert resolve(threshold=0.3).settings.confidence == 0.3
    assert resolve(exit="kl", threshold=0.3).settings.kl == 0.3
    assert resolve(kv_policy="last").settings.kv_policy == "last"
    assert resolve(loops=3).describe() == {"rule": "fixed", "loops": 3}
    for bad in (
        dict(exit="luck"), dict(kv_policy="all"), dict(loops=0), dict(min_loops=0),
        dict(min_loops=5, max_loops=4), dict(max_loops=0), dict(prompt_loops=0),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            resolve(**bad)


def test_what_a_rule_looks_at_is_counted_by_hand():
    """A token that stops after loop 5, where the rule is asked after 2, 3, 4 and 5."""
    counted = {
        # read-outs through the vocabulary, looks at the confidence, looks at the gain
        None: (1, 1, 0),
        "auto": (1, 4, 4),
        "confidence": (1, 4, 0),
        "gain": (1, 1, 4),
        "kl": (5, 1, 0),
        "entropy": (5, 1, 0),
        "maxprob": (5, 1, 0),
    }
    for rule, expected in counted.items():
        assert Exit(2, 10, SETTINGS, rule).passes(5) == expected
    assert Exit(1, 10, SETTINGS, "gain").passes(1) == (1, 1, 1)
    assert Exit(1, 10, SETTINGS, "gain").passes(3.5) == (1, 1, 3.5)
    assert Exit(4, 10, SETTINGS, "auto").passes(4) == (1, 1, 1)


def test_a_predicted_gain_is_bounded_by_what_a_token_can_lose():
    """e^10 nats, of numbers and of tensors alike."""
    steep = ExitSettings(gain_slope=(1.0,), gain_power=(0.0,), gain_offset=(0.0,))
    for said, nats in (9.0, math.exp(9)), (11.0, math.exp(10)), (800.0, math.exp(10)):
        alone = calibrated(0.0, said, 1.0, 1, steep)[1]
        many = calibrated(*torch.tensor([[0.0], [said], [1.0]]), 1, steep)[1]
        assert alone == pytest.approx(nats) and float(many) == pytest.approx(nats)


def test_which_loops_are_checked_by_hand():
    ruled, fixed = Exit(3, 10, SETTINGS, "auto"), Exit(4, 4, SETTINGS)
    assert [e.first_check for e in (ruled, fixed, Exit(5, 3, SETTINGS, "gain"))] == [3, 4, 3]
    assert [ruled.next_check(loop) for loop in (0, 1, 2, 3, 9)] == [3, 3, 3, 4, 10]
    assert [fixed.next_check(loop) for loop in (0, 3, 4)] == [4, 4, 5]
    assert Exit(3, 10, SETTINGS, "kl").next_check(0) == 1  # the second is compared with the first
    assert [ruled.checks(0, after) for after in (2, 3, 5)] == [0, 1, 3]
    assert [ruled.checks(before, 5) for before in (2, 3, 4, 5)] == [3, 2, 1, 0]


def test_thresholds_for_kernels_by_hand():
    settings = replace(SETTINGS, confidence_offset=0.5)
    odds, nats = (math.log(0.93 / 0.07) - 0.5) * 2 - 1e-4, 0.1 + 1e-5
    far = 1e30
    for rule, expected in (
        ("auto", (odds, nats)), ("confidence", (odds, -far)), ("gain", (far, nats)),
        ("kl", (far, -far)), (None, (far, -far)),
    ):  # fmt: skip
        found = Exit(1, 10, settings, rule).kernel_thresholds()
        assert found == pytest.approx(expected, abs=1e-9)
    for always, sign in (1.0, 1), (0.0, -1):  # which have no log-odds
        own = replace(SETTINGS, confidence=always, temperature=1.0)
        found = Exit(1, 10, own, "confidence").kernel_thresholds()[0]
        assert found == pytest.approx(sign * math.log(1e15), rel=1e-2)


def test_depths_of_many_tokens_by_hand():
    sure = torch.tensor([[0.95, 0.1, 0.1], [0.95, 0.95, 0.1], [0.1, 0.95, 0.1], [0.99] * 3])
    for least, most, expected in (1, 3, [1, 2, 3]), (2, 3, [2, 2, 3]), (3, 4, [4, 3, 4]):
        own = Exit(least, most, SETTINGS, "confidence")
        assert own.depths({"confidence": sure}).tolist() == expected
        # One loop after the other decides the same.
        for token, depth in enumerate(expected):
            told = [bool(own.stops(loop, ExitSignals(float(sure[loop - 1, token]), 9.0)))
                    for loop in range(1, most + 1)]  # fmt: skip
            assert told.index(True) + 1 == depth
