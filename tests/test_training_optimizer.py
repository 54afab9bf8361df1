"""The optimizer: Muon against torch's own, and its state that comes back."""

from __future__ import annotations

import pytest
import torch
from audio_cases import HEARING
from test_training_objective import batch, model, schedule

from looptx_core.config.run import TrainConfig
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.muon import Muon, orthogonal
from looptx_core.training.objective import loop_loss
from looptx_core.training.optimizer import (
    build_adamw,
    build_optimizer,
    clip_by_part,
    learning_rate_factor,
)

pytestmark = pytest.mark.fast


def test_muon_for_the_blocks_and_adamw_for_the_rest() -> None:
    """Every weight is stepped by one of the two, and their state comes back."""
    tokens, ids = batch()
    config = TrainConfig(lr=0.01)
    runs = []
    for interrupted in (False, True):
        net = model()
        optimizer = build_optimizer(net, config)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
            list(net.parameters())
        )
        for step in range(4):
            if interrupted and step == 2:
                saved = optimizer.state_dict()
                optimizer = build_optimizer(net, config)
                optimizer.load_state_dict(saved)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (step + 1)
            found = loop_loss(net, tokens, schedule(), step, ids)
            (found.loss + found.confidence_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*runs)


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (48, 64)])
def test_matrices_become_orthogonal_as_torch_makes_them(shape: tuple[int, int]) -> None:
    """In float32 against the plain iteration in float64; in bf16 against torch's own step."""
    a, b, c = coefficients = (3.4445, -4.7750, 2.0315)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, *shape, generator=generator)
    start *= torch.logspace(0, -4, shape[1])  # singular values of many sizes
    for one, found in zip(start, orthogonal(start, coefficients, 5, 1e-7)):
        x = (one if shape[0] <= shape[1] else one.T).double()
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        x = x if shape[0] <= shape[1] else x.T
        assert torch.allclose(found.double(), x, atol=1e-3)

    weights = [torch.nn.Parameter(one.clone()) for one in start]
    alike = [torch.nn.Parameter(one.clone()) for one in start]
    ours = Muon(weights, 0.02, 0.1, torch.bfloat16)
    theirs = torch.optim.Muon(alike, 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, two in zip(weights, alike):
            one.grad = torch.randn(shape, generator=generator)
            two.grad = one.grad.clone()
        ours.step()
        theirs.step()
    for one, two in zip(weights, alike):
        assert torch.allclose(one, two, atol=3e-3)
        assert torch.equal(ours.state[one]["momentum_buffer"], theirs.state[two]["momentum_buffer"])


def test_the_type_of_muons_products_is_in_its_state() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    saved = Muon([weight], 0.1, 0.0, torch.float32).state_dict()
    other = Muon([weight], 0.1, 0.0, torch.bfloat16)
    other.load_state_dict(saved)
    assert other.param_groups[0]["products"] == "float32"


def test_muon_leaves_convolutions_to_adamw() -> None:
    """Their kernels are no matrices."""
    net = LoopedTransformer(HEARING)
    (muon, adamw) = build_optimizer(net, TrainConfig()).parts
    encoder = net.encoders()["audio"]
    kernels = {id(m.weight) for m in encoder.modules() if isinstance(m, torch.nn.Conv1d)}
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    assert kernels and not kernels & taken
    decayed = {id(p) for g in adamw.param_groups if g["weight_decay"] for p in g["params"]}
    assert kernels <= decayed
    assert {id(p) for p in encoder.blocks.parameters() if p.dim() == 2} <= taken


def test_learning_rate() -> None:
    factor = learning_rate_factor(TrainConfig(steps=100, warmup=0.1, min_lr=0.1))
    assert factor(0) == 0.1 and factor(9) == 1.0 and factor(55) == pytest.approx(0.55)
    assert factor(100) == pytest.approx(0.1)


def test_the_learning_rate_falls_as_torchs_cosine() -> None:
    """Between its ends, where a straight line would be elsewhere."""
    factor = learning_rate_factor(TrainConfig(steps=100, warmup=0.1, min_lr=0.1))
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(plain, T_max=90, eta_min=0.1)
    for step in range(10, 101):
        assert factor(step) == pytest.approx(cosine.get_last_lr()[0], abs=1e-12)
        plain.step()
        cosine.step()
    assert factor(1000) == factor(100)
    without = learning_rate_factor(TrainConfig(steps=100, warmup=0))
    assert without(0) == without(1) == 1 > without(2)


@pytest.mark.parametrize("build", [build_optimizer, build_adamw])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_weight_decay_is_for_matrices_alone(build, kind: str) -> None:
    """A step without a gradient changes a weight by its decay, and by nothing else."""
    net = model()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    build(net, TrainConfig(lr=0.1, weight_decay=0.5, optimizer=kind)).step()
    for name, parameter in net.named_parameters():
        expected = 0.95 if parameter.dim() >= 2 else 1.0
        assert torch.allclose(parameter, torch.tensor(expected)), name


@pytest.mark.parametrize("build", [build_optimizer, build_adamw])
def test_adamws_first_steps_are_torchs(build) -> None:
    """By the momenta that the settings and the documentation name."""
    config = TrainConfig(lr=0.01, weight_decay=0.1, optimizer="adamw", beta2=0.8)
    net, plain = model(), model()
    optimizer = build(net, config)
    matrices = [p for p in plain.parameters() if p.dim() >= 2]
    vectors = [p for p in plain.parameters() if p.dim() < 2]
    reference = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.8), weight_decay=0.1,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    for (name, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name


def test_trunk_and_head_are_clipped_apart() -> None:
    net = model()

    def norms() -> list[float]:
        parts = net.trunk_parameters(), list(net.confidence.parameters())
        return [float(torch.cat([p.grad.flatten() for p in part]).norm()) for part in parts]

    for limit, expected in (0.0, None), (1e6, None), (0.5, 0.5):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = norms()
        assert float(clip_by_part(net, limit)) == pytest.approx(before[0])
        assert norms() == pytest.approx(before if expected is None else [expected] * 2, rel=1e-4)


@pytest.mark.parametrize("width", [63, 64, 96])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_wide_matrices_are_multiplied_once(width: int, products: torch.dtype) -> None:
    """FLOPs by hand for five steps on n rows: a product of n x n by n x w costs 2 n n w.

    Plainly a step takes the Gram matrix, its square, and the product with the matrix. From twice as
    wide as high float32 takes one Gram matrix and one last product; between are only squares: one a
    step for the bracket, and from one step to the next one for the whole and two for the Gram.
    """
    from torch.utils.flop_counter import FlopCounterMode

    n = 32
    with FlopCounterMode(display=False) as counter:
        orthogonal(torch.ones(1, n, width, dtype=products), (3.4445, -4.7750, 2.0315), 5, 1e-7)
    square, wide = 2 * n**3, 2 * n * n * width
    is_short = products == torch.float32 and width >= 2 * n
    expected = 2 * wide + (5 + 3 * 4) * square if is_short else 5 * (2 * wide + square)
    assert counter.get_total_flops() == expected


def test_a_matrix_that_is_alone_of_its_shape_is_stepped() -> None:
    start = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    weight, still = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(3, 3))
    weight.grad = start.flip(1)
    Muon([weight, still], 0.1, 0.5, torch.float32).step()
    turned = orthogonal(weight.grad[None], (3.4445, -4.7750, 2.0315), 5, 1e-7)[0]
    assert torch.allclose(weight, 0.95 * start - 0.1 * 0.2 * 10**0.5 * turned, atol=1e-4)
    assert torch.equal(still, torch.ones(3, 3))  # which has no gradient


def test_wsd_stays_and_then_falls_in_a_line() -> None:
    settings = {"steps": 100, "warmup": 0.1, "min_lr": 0.1, "lr_decay": 0.2}
    factor = learning_rate_factor(TrainConfig(lr_schedule="wsd", **settings))
    assert factor(4) == pytest.approx(0.5) and {factor(s) for s in range(9, 81)} == {1.0}
    assert factor(90) == pytest.approx(0.55) and factor(95) == pytest.approx(0.325)
    assert factor(100) == factor(1000) == pytest.approx(0.1)
    at_once = learning_rate_factor(TrainConfig(lr_schedule="wsd", **{**settings, "lr_decay": 1.0}))
    assert at_once(10) == 1.0 > at_once(11), "never before the warm-up is over"


def test_a_constant_learning_rate_stays() -> None:
    factor = learning_rate_factor(TrainConfig(lr_schedule="constant", steps=100, warmup=0.1))
    assert factor(4) == 0.5 and factor(9) == factor(60) == factor(1000) == 1.0
