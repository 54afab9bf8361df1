"""Several residual streams between loops: how they start, are mixed, and learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_model import CONFIG, build, tokens

from looptx_core.errors import UsageError
from looptx_core.model.injection import read_out
from looptx_core.model.loop import LoopedTransformer

pytestmark = pytest.mark.fast


def test_streams_start_at_the_normed_embedding_and_carry_it_along() -> None:
    config = replace(CONFIG, injection="streams")
    model = LoopedTransformer(config).double().eval()
    injection = model.injection
    with torch.no_grad():
        e = model.embed(tokens(), model.context(21))
        state = injection.open(e)
        assert state.shape == (2, 21, config.state_width) and torch.equal(
            injection.open(state), state
        )
        assert torch.allclose(injection(state, e, 1), injection.state_norm(e))
        output = torch.randn_like(e)
        streams = injection.after(state, e, output, 1).unflatten(-1, (4, -1))
        for stream, kept in enumerate((1 / 8, 3 / 8, 5 / 8, 7 / 8)):
            assert torch.allclose(streams[..., stream, :], kept * e + (1 - kept) * output)


def test_streams_are_mixed_by_gates_of_each_token() -> None:
    """Against the sums written out, with gates that have moved."""
    model = build(replace(CONFIG, injection="streams", streams=3))
    injection = model.injection
    with torch.no_grad():
        state, output = torch.randn(2, 5, 3 * 32).double(), torch.randn(2, 5, 32).double()
        normed = F.rms_norm(state, (96,))
        read = torch.sigmoid(F.linear(normed, injection.read.weight, injection.read.bias))
        write = torch.sigmoid(F.linear(normed, injection.write.weight, injection.write.bias))
        parts = state.split(32, -1)
        mixture = sum(read[..., i : i + 1] * part for i, part in enumerate(parts))
        assert torch.allclose(injection(state, output, 2), injection.state_norm(mixture))
        after = [
            write[..., i : i + 1] * part + 2 * write[..., 3 + i : 4 + i] * output
            for i, part in enumerate(parts)
        ]
        assert torch.allclose(injection.after(state, output, output, 2), torch.cat(after, -1))
        mean = sum(after) / 3
        assert torch.allclose(read_out(torch.cat(after, -1), 32), mean)


def test_streams_learn() -> None:
    """All gates have a gradient from the first step on, and steps lower the loss."""
    torch.manual_seed(0)
    model = LoopedTransformer(replace(CONFIG, injection="streams", core_layers=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(
            model(tokens(), 3).logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()
        )
        loss.backward()
        assert all(bool(p.grad.any()) for p in model.injection.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("streams", [1, 65])
def test_how_many_streams_there_may_be(streams: int) -> None:
    with pytest.raises(UsageError, match="streams"):
        replace(CONFIG, injection="streams", streams=streams)


def test_only_models_with_streams_store_their_number() -> None:
    assert "streams" not in CONFIG.to_dict()
    assert replace(CONFIG, injection="streams").to_dict()["streams"] == 4
