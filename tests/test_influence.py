"""Which tokens moved a prediction, against a slow reference that goes the other way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from looptx_core.config.model import ModelConfig
from looptx_core.inspection.influence import deletion_test, influence
from looptx_core.model.attention import Recording
from looptx_core.model.loop import LoopedTransformer

pytestmark = pytest.mark.fast

CONFIG = ModelConfig(
    vocab_size=97, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_seq_len=64,
    prelude_layers=2, core_layers=2, coda_layers=1, max_loops=4,
)  # fmt: skip


def build(config: ModelConfig) -> LoopedTransformer:
    torch.manual_seed(1)
    model = LoopedTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def reference(model: LoopedTransformer, tokens: torch.Tensor, at: int, depth: int) -> torch.Tensor:
    """What each token has in the prediction at one position, carried forwards as matrices.

    A layer adds to what it got its attention, as far as that raises the prediction. A loop begins
    with half of the last state and half of the prelude's output, but for streams.
    """
    config, recording = model.config, Recording()
    model.attend = recording
    told = model(tokens[None], depth).logits[0, at].log_softmax(-1).max()
    gradients = torch.autograd.grad(told, recording.weights)
    layers = []
    for weight, gradient in zip(recording.weights, gradients):
        used = torch.relu(weight[0].detach() * gradient[0]).mean(0)
        layers.append(torch.eye(len(tokens)) + used)
    share = torch.eye(len(tokens))
    for layer in layers[: config.prelude_layers]:
        share = layer @ share
    prelude = share
    for loop in range(depth):
        if config.injection not in ("none", "norm", "streams"):
            share = (share + prelude) / 2
        first = config.prelude_layers + loop * config.core_layers
        for layer in layers[first : first + config.core_layers]:
            share = layer @ share
    for layer in layers[len(layers) - config.coda_layers :]:
        share = layer @ share
    earlier = share[at, :at]
    return earlier / earlier.sum()


@pytest.mark.parametrize(
    "injection", ["decay", "bridge", "half_steps", "norm", "streams", "add", "none"]
)
def test_shares_are_what_is_carried_forwards(injection: str) -> None:
    model = build(replace(CONFIG, injection=injection))
    tokens = torch.randint(0, 97, (9,), generator=torch.Generator().manual_seed(3))
    depths = torch.tensor([1, 2, 3, 4, 1, 2, 3, 4, 3])
    shares = influence(model, tokens, depths)
    for at in range(2, 9):
        expected = reference(model, tokens, at, int(depths[at]))
        assert torch.allclose(shares[at, :at], expected, atol=1e-5)
        assert shares[at, at:].abs().max() == 0


def test_frozen_layers_change_no_share() -> None:
    """As those under adapters are, up to the layer that has the first of them."""
    model = build(CONFIG)
    tokens, depths = torch.arange(4), torch.tensor([1, 2, 1, 2])
    expected = influence(model, tokens, depths)
    assert torch.equal(influence(model.requires_grad_(False), tokens, depths), expected)
    model.core[1].requires_grad_(True)
    assert torch.equal(influence(model, tokens, depths), expected)


def test_where_tokens_can_be_taken_away() -> None:
    """At positions with more than twice as many tokens before them, spread over the sequence."""
    model = build(CONFIG)
    tokens = torch.randint(0, 97, (12,), generator=torch.Generator().manual_seed(3))
    depths = torch.full((12,), 2)
    shares = influence(model, tokens, depths)
    for few in (1, 7):
        assert deletion_test(model, tokens[:few], shares[:few, :few], depths[:few]) is None
    for length, positions, tested in (8, 16, 1), (12, 16, 5), (12, 2, 2):
        found = deletion_test(
            model, tokens[:length], shares[:length, :length], depths[:length], positions=positions
        )
        assert found is not None and (found.positions, found.removed) == (tested, 3)
