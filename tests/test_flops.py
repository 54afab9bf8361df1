"""What is counted of a model before it runs: parameters and FLOPs, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_model import CONFIG, build, tokens

from looptx_core.model.attention import explicit
from looptx_core.model.flops import TokenFlops, parameter_count, token_flops
from looptx_core.model.loop import LoopedTransformer

pytestmark = pytest.mark.fast


def test_counts() -> None:
    """Parameters by hand, and FLOPs against torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    assert parameter_count(CONFIG) == sum(p.numel() for p in LoopedTransformer(CONFIG).parameters())
    for config in (CONFIG, replace(CONFIG, injection="streams")):
        model = build(config)
        model.attend = explicit
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens(1, 32), 3)
        # The explicit back end multiplies the masked half too: every token meets all 32.
        counted = token_flops(config, 32).at(3, readouts=1, confidences=1, gains=1) * 32
        assert abs(counter.get_total_flops() / counted - 1) < 0.01


def test_counts_of_a_token_by_hand() -> None:
    # A block: 32 x 64 for queries, keys and values, 32 x 32, 3 x 32 x 48, and 10 scores, twice,
    # of 32; two FLOPs each. A unit of the head: two rows of 32 and an output.
    block, unit = 2 * (2048 + 1024 + 4608 + 640), 130
    counted = token_flops(CONFIG, 10)
    assert counted == TokenFlops(
        prelude=block, loop=2 * block, readout=block + 2 * 32 * 97, confidence=16 * unit,
        gain=8 * unit,
    )  # fmt: skip
    apart = TokenFlops(prelude=1, loop=10, readout=100, confidence=1000, gain=10_000)
    assert apart.at(3) == 1131
    assert apart.at(3, readouts=2, confidences=4, gains=5) == 54_231
    together = replace(apart, gain=0)  # the gain is told by the same units
    assert together.at(3, 2, 4, 5) == together.at(3, 2, 5, 4) == 5231
