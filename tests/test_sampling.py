"""Which tokens may be drawn, and how often they are."""

from __future__ import annotations

import math

import pytest
import torch

from looptx_core.config.generation import GenerationOptions
from looptx_core.errors import UsageError
from looptx_core.generation.sampling import check, keep, penalise, sample

pytestmark = pytest.mark.fast


def test_filters_by_hand():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def kept(**options):
        return keep(logits, GenerationOptions(**options)).nonzero()[:, 0].tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [0, 1] and kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=0.45) == [0] and kept(top_p=0.6) == [0, 1] and kept(top_p=0.9) == [0, 1, 2]
    assert kept(min_p=0.25) == [0, 1, 2] and kept(min_p=0.4) == [0, 1]
    # Top-p counts in what top-k leaves: 0.625 and 0.375.
    assert kept(top_k=2, top_p=0.6) == [0] and kept(top_k=2, top_p=0.7) == [0, 1]
    shuffled = keep(logits[[2, 0, 3, 1]], GenerationOptions(top_p=0.6))
    assert shuffled.tolist() == [False, True, False, True]
    ids = torch.tensor([0, 1, 1])
    assert penalise(torch.tensor([2.0, -1.0, 3.0]), ids, 2.0).tolist() == [1.0, -2.0, 3.0]


def test_draws_follow_the_distribution():
    logits, none = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([], dtype=torch.long)
    generator = torch.Generator().manual_seed(0)

    def shares(**options):
        options = GenerationOptions(**options)
        drawn = [sample(logits, options, none, generator) for _ in range(2000)]
        return [drawn.count(i) / 2000 for i in range(3)]

    assert shares(temperature=1.0) == pytest.approx([0.5, 0.3, 0.2], abs=0.04)
    # Squares of the probabilities, normalised: 25, 9 and 4 of 38.
    assert shares(temperature=0.5) == pytest.approx([25 / 38, 9 / 38, 4 / 38], abs=0.04)
    assert shares(temperature=1.0, top_k=2) == pytest.approx([0.625, 0.375, 0], abs=0.04)
    assert shares(temperature=1e-30)[0] == shares(temperature=0)[0] == 1
    seen = torch.tensor([0])
    assert sample(logits, GenerationOptions(temperature=0, repetition_penalty=3.0), seen, generator)


def test_what_no_draw_can_follow_is_refused():
    for good in (
        dict(max_new_tokens=1), dict(temperature=0), dict(top_k=0), dict(top_k=1), dict(top_p=1),
        dict(top_p=0.01), dict(min_p=0), dict(min_p=1), dict(repetition_penalty=0.5),
        dict(speculate=0), dict(speculate=1), dict(stop=("a",)),
    ):  # fmt: skip
        check(GenerationOptions(**good))
    for bad in (
        dict(max_new_tokens=0), dict(temperature=-0.1), dict(top_k=-1), dict(top_p=0),
        dict(top_p=1.01), dict(min_p=-0.01), dict(min_p=1.01), dict(repetition_penalty=0),
        dict(speculate=-1), dict(stop=("a", "")),
    ):  # fmt: skip
        ((name, value),) = bad.items()
        said = "''" if name == "stop" else f"must .*, not {value}$"
        with pytest.raises(UsageError, match=f"^`{name}` {said}"):
            check(GenerationOptions(**bad))
    for bad in (
        dict(seed=-1), dict(seed=2**63), dict(threshold=math.nan), dict(threshold=math.inf),
        dict(loops=0), dict(max_loops=-1), dict(temperature=math.inf),
        dict(repetition_penalty=math.inf),
    ):  # fmt: skip
        (name,) = bad
        with pytest.raises(UsageError, match=f"^`{name}` must "):
            check(GenerationOptions(**bad))
