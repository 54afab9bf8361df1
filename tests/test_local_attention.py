"""Layers that attend within a window, with rotary frequencies of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_model import CONFIG, build, tokens

from looptx_core.config.local_attention import LocalAttention
from looptx_core.errors import UsageError
from looptx_core.model.cache import LoopCache
from looptx_core.model.flops import token_flops

pytestmark = pytest.mark.fast


def test_local_layers_see_their_window_and_no_more() -> None:
    """Four layers of which each sees 3 tokens see 9 together in one loop, and two more in two."""
    config = replace(CONFIG, local_attention=LocalAttention(3, 0), norm_position="both")
    model, ids = build(config), tokens(1, 21)
    changed = ids.clone()
    changed[0, 0] += 1
    cache = LoopCache(config, 1, 21, 2, dtype=torch.float64)
    with torch.no_grad():
        for loops, reach in ((1, 4 * 2), (2, 6 * 2)):
            moved = (model(ids, loops).logits - model(changed, loops).logits).abs().amax((0, 2))
            assert (moved[: reach + 1] > 1e-6).all() and (moved[reach + 1 :] == 0).all()
        parts = [model(part, 2, cache).logits for part in ids.split([10, 8, 1, 1, 1], 1)]
        assert (torch.cat(parts, 1) - model(ids, 2).logits).abs().max() < 1e-9
    # What leaves the window costs nothing.
    near, far = (token_flops(config, context) for context in (3, 9))
    assert near == far and token_flops(CONFIG, 9).loop > token_flops(CONFIG, 3).loop
    with pytest.raises(UsageError, match="a memory has a window of its own"):
        replace(config, memory="delta")
    for changes in ({"window": -1}, {"every": 20_000}, {"rope_theta": 0.0}):
        with pytest.raises(UsageError, match="local_attention"):
            LocalAttention(**changes)
