"""FlashAttention: packed documents against masks, and which version is chosen; on a GPU if any."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.errors import MissingError
from looptx_core.model.attention import (
    FLASH_KINDS,
    Backend,
    Flash,
    FlashKind,
    VarlenBatch,
    choose_backend,
    choose_flash,
    explicit,
    sdpa,
    trial_error,
    within_documents,
)
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss

CPU = torch.device("cpu")
DOCUMENTS = torch.tensor(
    [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0], [5, 6, 6, 6, 6, 6, 7, 7]]
)


def by_hand(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, length: int) -> Tensor:
    """What a kernel of variable lengths does, document by document."""
    out = torch.empty_like(q)
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
        assert 0 < end - start <= length
        one = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        result = F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
        out[start:end] = result[0].transpose(0, 1)
    return out


def test_documents_become_starts() -> None:
    packed = VarlenBatch.of(DOCUMENTS)
    assert packed.starts.tolist() == [0, 3, 5, 8, 16, 17, 22, 24]
    assert packed.starts.dtype == torch.int32 and packed.length == 8
    assert packed[1:].starts.tolist() == [0, 8, 9, 14, 16]
    assert packed[torch.tensor([2, 0])].starts.tolist() == [0, 1, 6, 8, 11, 13, 16]
    assert torch.equal(packed.mask(), within_documents(DOCUMENTS))


def test_packing_equals_the_mask() -> None:
    torch.manual_seed(0)
    shape = (3, 4, 8, 16)
    q, k, v = (torch.randn(3, heads, 8, 16) for heads in (4, 2, 2))
    packed, half = VarlenBatch.of(DOCUMENTS), torch.bfloat16
    want = explicit(q, k, v, within_documents(DOCUMENTS))
    for attend in (sdpa, explicit, Flash(by_hand)):  # float32: through the mask
        torch.testing.assert_close(attend(q, k, v, packed), want, atol=1e-5, rtol=1e-5)
    out = Flash(by_hand)(q, k, v.to(half), packed)  # queries in float32, as under autocast
    assert out.dtype == half and out.shape == shape
    torch.testing.assert_close(out.float(), want, atol=0.03, rtol=0.03)


def test_training_packs_where_the_back_end_does() -> None:
    """The same loss and gradients through masks and through packing, rows dropping out by depth."""
    torch.manual_seed(0)
    model = LoopedTransformer(
        ModelConfig(vocab_size=64, d_model=32, n_heads=4, head_dim=8, d_ff=48)
    )
    tokens = torch.randint(0, 64, (6, 25))
    ends = torch.randint(0, 5, (6, 24)) == 0
    documents = ends.cumsum(1)
    config = TrainConfig(loop_schedule="sampled")
    calls = []

    def counted(*arguments: Tensor) -> Tensor:
        calls.append(len(arguments[3]) - 1)
        return by_hand(*arguments)

    def run(attend: object) -> tuple[Tensor, list[Tensor]]:
        model.attend = attend
        with torch.autocast("cpu", torch.bfloat16):
            found = loop_loss(model, tokens, LoopSchedule(config, 10), 0, torch.arange(6),
                              documents=documents)  # fmt: skip
        gradients = torch.autograd.grad(found.loss, model.trunk_parameters())
        return found.loss, list(gradients)

    flash = Flash(counted)
    loss, gradients = run(flash)
    assert calls and len(set(calls)) > 1  # fewer documents once sequences are done
    want, expected = run(sdpa)
    assert loss.item() == pytest.approx(want.item(), abs=2e-3)
    norms = [torch.cat([g.flatten() for g in each]) for each in (gradients, expected)]
    assert (norms[0] - norms[1]).norm() < 0.05 * norms[1].norm()
    run(explicit)


def kind(name: str, varlen: object, module: str = "torch", majors: range = range(8, 99)):
    def make() -> object:
        if isinstance(varlen, Exception):
            raise varlen
        return varlen

    return FlashKind(name, module, majors, make)


def test_the_newest_that_passes_a_trial_is_chosen() -> None:
    def wrong(*arguments: Tensor) -> Tensor:
        return 1.5 * by_hand(*arguments)

    good = kind("good", by_hand)
    found = choose_flash(9, CPU, torch.bfloat16, [kind("newer", by_hand), good])
    assert isinstance(found, Backend) and found.reason.startswith("newer runs")
    for bad, word in (
        (kind("bad", wrong), "off by"),
        (kind("bad", RuntimeError("no kernels")), "no kernels"),
        (kind("bad", by_hand, module="no_such_module.inside"), "needs no_such_module.inside"),
        (kind("bad", by_hand, majors=range(9, 10)), "capability 8"),
    ):
        found = choose_flash(8, CPU, torch.bfloat16, [bad, good])
        assert isinstance(found, Backend) and found.reason.startswith("good runs")
        assert word in found.reason
        none = choose_flash(8, CPU, torch.bfloat16, [bad])
        assert isinstance(none, str) and word in none and "pip install" in none


def test_without_a_gpu_the_reason_is_said() -> None:
    chosen = choose_backend("auto", CPU, torch.bfloat16)
    assert chosen.name == "sdpa" and "CUDA" in chosen.reason
    with pytest.raises(MissingError, match="CUDA"):
        choose_backend("flash", CPU, torch.bfloat16)


def test_a_trial_tells_right_from_wrong() -> None:
    assert trial_error(Flash(by_hand), CPU, torch.bfloat16) < 0.03
    assert trial_error(sdpa, CPU, torch.float32) < 1e-5
    causal_only = lambda q, k, v, mask: sdpa(q, k, v, None)  # noqa: E731
    assert trial_error(causal_only, CPU, torch.float32) > 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flash_equals_sdpa_on_this_gpu() -> None:
    """Every version that is here, forward and backward, within what bf16 itself loses."""
    device = torch.device("cuda")
    major = torch.cuda.get_device_capability(device)[0]
    tried = 0
    for version in FLASH_KINDS:
        found = choose_flash(major, device, torch.bfloat16, [version])
        if isinstance(found, str):
            continue
        tried += 1
        torch.manual_seed(0)
        documents = (torch.rand(4, 512, device=device) < 0.01).cumsum(1)
        plain = [torch.randn(4, heads, 512, 64, device=device) for heads in (8, 2, 2)]
        want = sdpa(*plain, within_documents(documents))
        half = [x.bfloat16().requires_grad_() for x in plain]
        mask = within_documents(documents)
        ours, theirs = found.attend(*half, VarlenBatch.of(documents)), sdpa(*half, mask)
        lost = (theirs.float() - want).norm()
        assert (ours.float() - want).norm() < 1.5 * lost + 1e-3 * want.norm(), version.name
        one, two = (torch.autograd.grad(out.float().square().sum(), half) for out in (ours, theirs))
        for a, b in zip(one, two):
            assert (a.float() - b.float()).norm() < 0.02 * b.float().norm(), version.name
    assert tried or major < 8
