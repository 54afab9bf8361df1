"""Training's objective and its depths: what is learned, and what is drawn."""

from __future__ import annotations

import operator

import pytest
import torch

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.model import fused
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.evaluate import evaluate_loops
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss
from looptx_core.training.optimizer import clip_by_part

pytestmark = pytest.mark.fast

MODEL = ModelConfig(
    vocab_size=400, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64, core_layers=1
)


def model(seed: int = 0) -> LoopedTransformer:
    torch.manual_seed(seed)
    return LoopedTransformer(MODEL)


def batch(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 400, (rows, 17), generator=generator), torch.arange(rows)


def schedule(**settings) -> LoopSchedule:
    return LoopSchedule(TrainConfig(**settings), MODEL.max_loops)


def unasked(by: str) -> torch.Tensor:
    raise AssertionError(f"nothing to measure the {by} for")


def test_depths_are_functions_of_seed_step_and_sample() -> None:
    drawn = schedule(loop_schedule="sampled", mean_loops=4)
    together = drawn.depths(7, torch.arange(64), unasked)
    alone = [int(drawn.depths(7, torch.tensor([i]), unasked)) for i in range(64)]
    assert together.tolist() == alone
    assert together.tolist() != drawn.depths(8, torch.arange(64), unasked).tolist()
    many = drawn.depths(0, torch.arange(4000), unasked)
    assert set(many.tolist()) == set(range(1, 11))
    assert 3.4 < float(many.double().mean()) < 4  # the truncation at 10 costs some of the 4
    deep = schedule(loop_schedule="sampled", mean_loops=4, loops=3)
    assert set(deep.depths(8, torch.arange(2000), unasked).tolist()) == set(range(3, 11))
    assert [deep.first_read(at) for at in ("last", "pair", "all")] == [3, 2, 1]


def test_depths_grow_over_a_share_of_the_steps() -> None:
    grows = schedule(loop_schedule="grow", steps=100, grow_share=0.5, mean_loops=4)
    ids = torch.arange(2000)
    by_step = [grows.depths(step, ids, unasked) for step in (0, 12, 25, 37, 49)]
    assert by_step[0].tolist() == [1] * 2000
    means = [float(depths.double().mean()) for depths in by_step]
    assert means == sorted(means)
    assert [int(depths.max()) for depths in by_step] == [1, 3, 6, 8, 10]
    free = schedule(loop_schedule="sampled", mean_loops=4)
    for step in (50, 99):
        assert torch.equal(grows.depths(step, ids, unasked), free.depths(step, ids, unasked))
    deep = schedule(loop_schedule="grow", steps=100, loops=3, grow_share=0.5)
    assert set(deep.depths(0, ids, unasked).tolist()) == {3}
    at_once = schedule(loop_schedule="grow", steps=100, grow_share=0.0, mean_loops=4)
    assert torch.equal(at_once.depths(0, ids, unasked), free.depths(0, ids, unasked))


@pytest.mark.parametrize(("loss_at", "prior"), [("pair", 0), ("all", 0), ("all", 1.5), ("last", 2)])
def test_the_objective_is_the_mean_of_the_readouts(loss_at: str, prior: float) -> None:
    """Against one plain pass for each sequence."""
    net, (tokens, ids) = model(), batch()
    drawn = schedule(loop_schedule="sampled")
    depths = drawn.depths(3, ids, unasked).tolist()
    found = loop_loss(net, tokens, drawn, 3, ids, loss_at=loss_at, loss_prior=prior)
    rows = []
    for row, depth in enumerate(depths):
        losses = evaluate_loops(net, tokens[row : row + 1], depth).loss_by_loop
        first = {"pair": max(0, depth - 2), "all": 0, "last": depth - 1}[loss_at]
        counts = [loop**prior for loop in range(first + 1, depth + 1)]
        rows.append(sum(map(operator.mul, counts, losses[first:])) / sum(counts))
    assert float(found.loss.detach()) == pytest.approx(sum(rows) / len(rows), abs=1e-5)
    assert found.mean_loops == sum(depths) / len(depths)


def test_loss_sends_the_hard_sequences_deeper() -> None:
    net, (tokens, ids) = model(), batch()
    losses = [evaluate_loops(net, tokens[i : i + 1], 1).loss_by_loop[0] for i in range(6)]
    middle = sorted(losses)[3] - 1e-6
    rule = schedule(loop_schedule="loss", deeper_by="loss", loss_threshold=middle, explore=0.0)
    depths = rule.depths(0, ids, lambda by: torch.tensor(losses))
    assert [depth >= 2 for depth in depths.tolist()] == [loss > middle for loss in losses]
    assert loop_loss(net, tokens, rule, 0, ids).mean_loops == float(depths.double().mean())


def test_loss_sends_deeper_what_has_most_to_gain() -> None:
    """By the confidence head's forecast, made here to be what a token's own bias says."""
    net, (tokens, ids) = model(), batch()
    with torch.no_grad():
        gains = net.confidence(next(net.states(tokens[:, :-1], 1)), 1).gain.mean(1)
    rule = schedule(loop_schedule="loss", deeper_share=0.5, explore=0.0)
    deeper = rule.depths(0, ids, lambda by: gains) >= 2
    assert deeper.tolist() == (gains > gains.median()).tolist()
    fresh = schedule(loop_schedule="loss", deeper_share=0.5, explore=0.0)
    assert loop_loss(net, tokens, fresh, 0, ids).mean_loops == float(
        rule.depths(0, ids, lambda by: gains).double().mean()
    )


def test_a_share_of_the_sequences_draws_its_depth_regardless() -> None:
    rule = schedule(loop_schedule="loss", explore=0.5, loss_threshold=1e9)
    depths = rule.depths(0, torch.arange(2000), lambda by: torch.zeros(2000))
    free = schedule(loop_schedule="sampled").depths(0, torch.arange(2000), unasked)
    expected = 0.5 * float((free >= 2).double().mean())
    assert float((depths >= 2).double().mean()) == pytest.approx(expected, abs=0.05)


def test_the_adaptive_threshold_is_in_the_state() -> None:
    rule = schedule(loop_schedule="loss", explore=0.0, deeper_share=0.5)
    rule.depths(0, torch.arange(3), lambda by: torch.tensor([1.0, 2.0, 3.0]))
    assert float(rule.state_dict()["threshold"]) == 2.0


def test_the_adaptive_threshold_remembers_ten_steps() -> None:
    """After the losses' quantile falls from 1 to 0, the threshold falls as 0.9 to the steps."""
    rule = schedule(loop_schedule="loss", explore=0.0, deeper_share=0.5)
    rule.depths(0, torch.arange(4), lambda by: torch.ones(4))
    for step in range(1, 11):
        rule.depths(step, torch.arange(4), lambda by: torch.zeros(4))
        assert float(rule.threshold) == pytest.approx(0.9**step, abs=1e-6)
    rule.eval()
    rule.depths(11, torch.arange(4), lambda by: torch.zeros(4))
    assert float(rule.threshold) == pytest.approx(0.9**10, abs=1e-6)


@pytest.mark.parametrize("rule", ["sampled", "loss"])
def test_a_masked_document_learns_what_it_would_alone(rule: str) -> None:
    """The loss of a window of two documents is that of the documents, each by itself."""
    net, (tokens, ids) = model(), batch()
    with torch.no_grad():  # so that what is attended to shows
        for parameter in net.trunk_parameters():
            parameter.mul_(3)
    documents = torch.zeros(6, 16, dtype=torch.long)
    documents[:, 7:] = 1
    drawn = schedule(loop_schedule=rule, explore=0.0, loss_threshold=-1e9)
    together = loop_loss(net, tokens, drawn, 0, ids, documents=documents)
    first = loop_loss(net, tokens[:, :8], drawn, 0, ids)
    second = loop_loss(net, tokens[:, 7:], drawn, 0, ids)
    alone = (7 * first.loss + 9 * second.loss) / 16
    assert float(together.loss.detach()) == pytest.approx(float(alone.detach()), abs=1e-5)
    assert net.context(16, documents=documents).mask is not None
    assert net.context(16, documents=documents * 0 + 3).mask is None
    unmasked = loop_loss(net, tokens, drawn, 0, ids)
    assert abs(float(unmasked.loss.detach()) - float(alone.detach())) > 1e-5


@pytest.mark.parametrize("kernel", [True, False])
def test_the_score_of_a_read_out(kernel: bool) -> None:
    """With a target that is none among them, which others leave out."""
    fused.enable_fused(kernel)
    net, decoded, targets = model(), torch.randn(9, 32), torch.arange(9)
    with torch.no_grad():
        chances = net.head(decoded).softmax(-1)
        targets[:4] = chances[:4].argmax(-1)
        targets[4] = -100
    scored = net.score(decoded.requires_grad_(kernel), targets)
    known = targets >= 0
    losses = -chances[known, targets[known]].log()
    assert torch.allclose(scored.loss[known], losses, atol=1e-5) and scored.loss[4] == 0
    assert scored.hit[known].tolist() == (chances.argmax(-1) == targets)[known].float().tolist()
    assert torch.allclose(scored.top, chances.amax(-1), atol=1e-5)
    fused.enable_fused(False)


@pytest.mark.parametrize("can", [True, False])
def test_a_score_takes_the_kernel_where_it_can(monkeypatch: pytest.MonkeyPatch, can: bool) -> None:
    taken = (torch.ones(3), torch.zeros(3), torch.ones(3))
    monkeypatch.setattr("looptx_core.model.score.cross_entropy", lambda *_: taken)
    monkeypatch.setattr("looptx_core.model.score.can_use_fused", lambda *_, **__: can)
    score = model().score(torch.ones(3, 32), torch.arange(3))
    assert all(torch.equal(a, b) for a, b in zip(score, taken)) == can


def test_targets_of_weight_zero_cost_no_product_and_change_nothing() -> None:
    tokens, ids = batch()
    weights = torch.full((6, 16), 16 / 7)
    weights[:, :9] = 0
    found = []
    for other in (False, True):
        net = model()
        if other:  # what does not count may be any token
            targets = tokens[:, 1:].clone()
            targets[:, :9] = 5
        else:
            targets = tokens[:, 1:]
        result = loop_loss(
            net, tokens[:, :-1], schedule(), 0, ids, targets=targets, weights=weights
        )
        found.append(result)
    assert torch.equal(found[0].loss, found[1].loss)
    whole = loop_loss(model(), tokens, schedule(), 0, ids)
    assert found[0].flops < whole.flops


def test_weights_count_in_every_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the losses by the product; in what is only read by the weighted mean."""
    net, (tokens, ids) = model(), batch()
    weights = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)) * 2 + 0.1
    wanted, measured = tokens[:, 1:], {}
    rule = schedule(loop_schedule="loss", loops=1)

    def depths(step, ids, measure):
        measured.update({by: measure(by) for by in ("gain", "loss")})
        return torch.full(ids.shape, 2)

    monkeypatch.setattr(rule, "depths", depths)
    found = loop_loss(net, tokens, rule, 0, ids, weights=weights)
    with torch.no_grad():
        first, _ = outputs = [net(tokens[:, :-1], loops) for loops in (1, 2)]
        losses = torch.stack([-o.logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
                              for o in outputs])  # fmt: skip
        hits = torch.stack([(o.logits.argmax(-1) == wanted).float() for o in outputs])
        tops = torch.stack([o.logits.softmax(-1).amax(-1) for o in outputs])
        sure = torch.stack([o.confidence.logit for o in outputs]).sigmoid()
        judged = -(tops * sure.log() + (1 - tops) * (1 - sure).log()) * weights
        errors = (first.confidence.gain - (losses[0] - losses[1])).square() * weights
    for by, values in ("gain", first.confidence.gain), ("loss", losses[0]):
        assert torch.allclose(measured[by], (values * weights).sum(1) / weights.sum(1), atol=1e-5)
    for name, expected in {
        "loss": (losses * weights).mean(),
        "confidence_loss": judged.mean() + errors.mean(),
        "deepest": (losses[1] * weights).sum() / weights.sum(),
        "confidence_error": ((sure - hits).abs() * weights).sum() / (2 * weights.sum()),
    }.items():
        assert float(getattr(found, name).detach()) == pytest.approx(float(expected), rel=1e-5)


def test_recomputing_gives_the_same_gradients() -> None:
    tokens, ids = batch()
    grads = []
    for recompute in (False, True):
        net = model()
        rule = schedule(loop_schedule="sampled")
        loop_loss(net, tokens, rule, 0, ids, recompute=recompute).loss.backward()
        grads.append([p.grad for p in net.trunk_parameters()])
    for one, two in zip(*grads):
        assert torch.allclose(one, two, atol=1e-7)


def test_the_confidence_head_learns_how_likely_the_top_token_is() -> None:
    """Its own probability, which the target has no part in; read once, so that no gain is seen."""
    net, (tokens, ids) = model(), batch()
    with torch.no_grad():  # so that probabilities are spread
        net.norm.weight.mul_(8)
    drawn = schedule(loop_schedule="fixed", loops=2)
    found = loop_loss(net, tokens, drawn, 0, ids, loss_at="last")
    with torch.no_grad():
        output = net(tokens[:, :-1], 2)
    top = output.logits.softmax(-1).amax(-1)
    assert float(top.std()) > 0.05
    sure = output.confidence.logit.sigmoid()
    expected = -(top * sure.log() + (1 - top) * (1 - sure).log()).mean()
    assert float(found.confidence_loss.detach()) == pytest.approx(float(expected), abs=1e-5)


def test_the_gain_is_learnt_from_the_drop_of_the_loss_within_four_nats() -> None:
    """Against the losses of plain passes; tokens that win or lose more count as four."""
    net, (tokens, ids) = model(), batch()
    with torch.no_grad():  # so that one more loop changes a token's loss by many nats
        net.norm.weight.mul_(100)
        for parameter in net.core.parameters():
            parameter.mul_(20)
        first, second = net(tokens[:, :-1], 1), net(tokens[:, :-1], 2)
        losses = [
            torch.nn.functional.cross_entropy(
                output.logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
            )
            for output in (first, second)
        ]
    drop = losses[0] - losses[1]
    assert (drop > 4).any() and (drop < -4).any() and (drop.abs() < 4).any()
    seen = torch.where(drop > 4, 4.0, torch.where(drop < -4, -4.0, drop))
    tops = [output.logits.softmax(-1).amax(-1) for output in (first, second)]
    told = [output.confidence.logit for output in (first, second)]
    sure = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.stack(told), torch.stack(tops)
    )
    expected = sure + (first.confidence.gain.flatten() - seen).square().mean()
    found = loop_loss(net, tokens, schedule(loop_schedule="fixed", loops=2), 0, ids)
    assert float(found.confidence_loss.detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("loops", [1, 4])
def test_the_cost_is_what_torch_counts_forward_and_backward(loops: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    fused.enable_fused(False)
    net, (tokens, ids) = model(), batch()
    with FlopCounterMode(display=False) as counter:
        found = loop_loss(net, tokens, schedule(loop_schedule="fixed", loops=loops), 0, ids)
        (found.loss + found.confidence_loss).backward()
    # The confidence head, which sends nothing back to the trunk, costs a little less than thrice.
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.04)


def test_the_confidence_head_does_not_move_the_trunk() -> None:
    tokens, ids = batch()
    trunks = []
    for weight in (0.0, 1.0):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for step in range(3):
            found = loop_loss(net, tokens, schedule(loop_schedule="sampled"), step, ids)
            (found.loss + weight * 100 * found.confidence_loss).backward()
            clip_by_part(net, 0.1)
            optimizer.step()
            optimizer.zero_grad()
        trunks.append(torch.cat([p.detach().flatten() for p in net.trunk_parameters()]))
    assert torch.equal(*trunks)
