"""torch.compile over the model's moves: the same loss and gradients, in few graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.compiled import compile_forward, uncompile_forward
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss

SHAPE = ModelConfig(
    vocab_size=64, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64,
    prelude_layers=1, core_layers=1, coda_layers=1, max_loops=10,
)  # fmt: skip


def losses_and_gradients(model: LoopedTransformer) -> list[Tensor]:
    """Of some steps, whose depths are drawn: from one to all rows are in the loop."""
    schedule, found = LoopSchedule(TrainConfig(loop_schedule="sampled"), SHAPE.max_loops), []
    for step in range(4):
        tokens = torch.randint(0, 64, (6, 17), generator=torch.Generator().manual_seed(step))
        documents = (torch.arange(16) // 7).expand(6, -1) if step % 2 else None
        result = loop_loss(
            model, tokens, schedule, step, torch.arange(6) + 6 * step, documents=documents
        )
        model.zero_grad()
        (result.loss + result.confidence_loss).backward()
        found.append(result.loss.detach())
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found


@pytest.mark.timeout(200)
def test_compiled_moves_learn_the_same() -> None:
    torch.manual_seed(0)
    model = LoopedTransformer(SHAPE)
    plain = losses_and_gradients(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_forward(model, "aot_eager")
    try:
        compiled = losses_and_gradients(model)
        with torch.no_grad():
            model(torch.zeros(1, 5, dtype=torch.long))
    finally:
        uncompile_forward(model)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
    counters = torch._dynamo.utils.counters
    # Each move for all rows, some and one, with documents and without; none of them in pieces.
    assert 4 <= counters["stats"]["unique_graphs"] <= 16
    assert not counters["graph_break"]
    assert "step" not in vars(model)
