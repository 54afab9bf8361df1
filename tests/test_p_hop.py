"""p-hop induction, against the definition read out word for word."""

from __future__ import annotations

import numpy as np
import torch

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.p_hop import IGNORED, p_hop, p_hop_batch
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.evaluate import evaluate_loops
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss


def by_definition(values: list[int], hops: int) -> list[int]:
    """find(i) = max{j <= i : v[j-1] = v[i]}, p times."""
    answers = []
    for place in range(len(values)):
        where: int | None = place
        for _ in range(hops):
            if where is not None:
                symbol = values[where]
                where = max(
                    (j for j in range(1, where + 1) if values[j - 1] == symbol), default=None
                )
        answers.append(IGNORED if where is None else values[where])
    return answers


def test_the_answers_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 4, (20, 24)), rng.integers(1, 6, 20)
    values, hops = (torch.from_numpy(part) for part in drawn)
    found = p_hop(values, hops)
    for row in range(20):
        assert found[row].tolist() == by_definition(values[row].tolist(), int(hops[row]))


def test_one_hop_by_hand() -> None:
    #        a  b  a  c  a   after the last a came c; after the one before, b
    values = torch.tensor([[0, 1, 0, 2, 0]])
    assert p_hop(values, torch.tensor([1]))[0].tolist() == [IGNORED, IGNORED, 1, IGNORED, 2]


def test_a_loss_with_targets_of_its_own() -> None:
    torch.manual_seed(0)
    tokens, targets, hops = p_hop_batch(np.random.default_rng(1), 4, 16, 3)
    assert tokens.shape == targets.shape == (4, 17) and (tokens[:, 0] == 3 + hops).all()
    model = LoopedTransformer(ModelConfig(vocab_size=8, max_loops=3)).eval()
    asked = targets != IGNORED
    schedule = LoopSchedule(TrainConfig(loop_schedule="fixed", loops=2), 3)
    found = loop_loss(
        model, tokens, schedule, 0, torch.arange(4),
        targets=targets, weights=asked / asked.float().mean(), loss_at="last",
    )  # fmt: skip
    seen = evaluate_loops(model, tokens, 2, asked, targets=targets)
    assert torch.isclose(found.loss, torch.tensor(seen.loss_by_loop[-1]), rtol=1e-4)
