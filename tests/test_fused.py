"""The fused kernels of training against the plain equations."""

from __future__ import annotations

import platform
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.errors import MissingError
from looptx_core.machine import kernels
from looptx_core.machine.heap import freed_memory_kept
from looptx_core.model import fused, products
from looptx_core.model.attention import VarlenBatch, explicit, sdpa
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.products import Product, multi_linear
from looptx_core.model.rope import rotary_tables, rotate
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss

pytestmark = pytest.mark.usefixtures("fused_kernels")


def results(function: Callable[..., Tensor], *inputs: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The value, and the gradient of each input, for a gradient of the value drawn once."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    value = function(*leaves)
    drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(9))
    value.backward(drawn.bfloat16().to(value.dtype))  # the same for every type
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def agree(one: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    found = results(one, *inputs, dtype=torch.float32)
    wanted = results(plain, *inputs, dtype=torch.float64)
    assert len(found) == len(wanted) == 1 + len(inputs)
    for left, right in zip(found, wanted):
        assert torch.allclose(left.double(), right, atol=1e-5, rtol=1e-5)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def draw(*shape: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("width", [48, 37])
def test_the_norm(width: int) -> None:
    agree(lambda x, w: fused.rms_norm(x, w, 1e-6), norm, draw(3, 7, width, size=3), draw(width))


def rounded_once(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Found is wanted to half a unit of bf16's 8 bits."""
    assert len(found) == len(wanted)
    for left, right in zip(found, wanted):
        assert float(((left.float() - right).abs() - right.abs() / 256).max()) < 1e-5
        assert float(left.float().abs().max()) > 0.1


def test_bf16_is_read_and_written_and_float32_in_between() -> None:
    """Against the plain equations in float32 on the same inputs, which bf16 holds exactly."""
    cos, sin = rotary_tables(torch.arange(7).view(1, 1, 7), 16, 1e4, torch.float32)
    targets = torch.arange(90) % 60
    x, heads, weight = draw(3, 7, 37, size=3).bfloat16(), draw(3, 7, 4, 16).bfloat16(), draw(37)
    gate, up, logits = draw(500, size=4).bfloat16(), draw(500).bfloat16(), draw(90, 60).bfloat16()
    pairs: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda x: fused.rms_norm(x, weight, 1e-6), lambda x: norm(x, weight), (x,)),
        (lambda x: fused.norm_and_rotate(x, None, 0.0, cos, sin),
         lambda x: rotate(x, (cos, sin)), (heads,)),
        (lambda x: fused.norm_and_rotate(x, weight[:16], 1e-6, cos, sin),
         lambda x: rotate(norm(x, weight[:16]), (cos, sin)), (heads,)),
        (fused.gated, lambda gate, up: F.gelu(gate) * up, (gate, up)),
        (partial(fused.gated, silu=True), lambda gate, up: F.silu(gate) * up, (gate, up)),
        (lambda x: fused.cross_entropy(x, targets)[0],
         lambda x: F.cross_entropy(x, targets, reduction="none"), (logits,)),
    ]  # fmt: skip
    for one, plain, inputs in pairs:
        found = results(one, *inputs, dtype=torch.bfloat16)
        rounded_once(found, results(plain, *inputs, dtype=torch.float32))
        assert all(gradient.dtype == torch.bfloat16 for gradient in found[1:])
    y = torch.full((1, 8), 3.0, dtype=torch.bfloat16)
    y[0, 2] = float("nan")
    assert fused.gated(y, y).isnan().tolist() == [[False, False, True, *[False] * 5]]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_products_with_adapters(kind: torch.dtype) -> None:
    """One of the layers has none; nothing is computed for what is frozen."""
    x, weight, plain = draw(2, 7, 16), draw(5, 16), draw(9, 16)
    adapters = draw(3, 16), draw(5, 3), draw(4, 16), draw(5, 4)

    def joined(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        each = Product(weight, a, b, 0.5), Product(plain), Product(weight, c, d, 2.0)
        with torch.autocast("cpu", kind, enabled=kind != torch.float32):
            return torch.cat(multi_linear(x, each), -1)

    def textbook(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        own = weight.to(x.dtype)
        return torch.cat(
            [x @ (own + b @ a / 2).T, x @ plain.to(x.dtype).T, x @ (own + 2 * d @ c).T], -1
        )

    if kind == torch.float32:
        agree(joined, textbook, x, *adapters)
    else:
        leaves = [t.clone().requires_grad_() for t in (x, *adapters)]
        value = joined(*leaves)
        assert value.dtype == kind
        value.backward(torch.ones_like(value))
        wanted = [t.clone().requires_grad_() for t in (x, *adapters)]
        textbook(*wanted).sum().backward()
        for one, two in zip(leaves, wanted):
            assert one.grad is not None and two.grad is not None and one.grad.dtype == one.dtype
            assert float((one.grad - two.grad).norm() / two.grad.norm()) < 0.02
    assert [len(y) for y in multi_linear(x[:0], [Product(weight), Product(plain)])] == [0, 0]
    x.requires_grad_()
    down, up = adapters[0].clone().requires_grad_(), adapters[1]
    multi_linear(x.detach(), [Product(weight, down, up)])[0].sum().backward()
    assert x.grad is None and weight.grad is None and up.grad is None and down.grad is not None


@pytest.mark.parametrize("tables", [1, 3])
def test_the_norm_with_rope(tables: int) -> None:
    positions = torch.arange(7 * tables).view(1, tables, 7)
    cos, sin = rotary_tables(positions, 16, 1e4, torch.float32)
    agree(
        lambda x, w: fused.norm_and_rotate(x, w, 1e-6, cos, sin),
        lambda x, w: rotate(norm(x, w), (cos.double(), sin.double())),
        draw(3, 7, 4, 16), draw(16),
    )  # fmt: skip


def test_products_of_one_input() -> None:
    """Beside each other, so that the gradient of what they share is a sum."""
    agree(
        lambda x, *weights: torch.cat(multi_linear(x, [*map(Product, weights)]), -1),
        lambda x, *weights: torch.cat([F.linear(x, weight) for weight in weights], -1),
        draw(2, 7, 16), draw(5, 16), draw(9, 16), draw(3, 16),
    )  # fmt: skip
    x, frozen, weight = draw(7, 16), draw(5, 16), draw(9, 16).requires_grad_()
    sum(y.sum() for y in multi_linear(x, [Product(frozen), Product(weight)])).backward()
    assert x.grad is None and frozen.grad is None
    assert torch.allclose(weight.grad, x.sum(0).expand(9, 16), atol=1e-5)


def test_a_layer_with_hooks_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 gathers weights by them, and keeps whole what is looked at outside of them."""
    net, called, seen = model(), [], []
    monkeypatch.setattr(products, "Product", lambda weight: seen.append(weight) or Product(weight))
    net.core[0].attention.k_proj.register_forward_pre_hook(lambda *_: called.append(1))
    net(torch.zeros(1, 4, dtype=torch.long))
    assert called == [1]
    hooked = net.core[0].attention.k_proj.weight
    assert seen and all(weight is not hooked for weight in seen)


def test_a_gate_of_two_types_is_computed_in_the_wider_one() -> None:
    gate, up = draw(300).bfloat16(), draw(300)
    for one, two in ((gate, up), (up, gate)):
        leaves = [x.clone().requires_grad_() for x in (one, two)]
        value = fused.gated(*leaves, silu=True)
        assert torch.allclose(value, F.silu(one.float()) * two.float(), atol=1e-5)
        value.sum().backward()
        assert [leaf.grad.dtype for leaf in leaves if leaf.grad is not None] == [
            one.dtype, two.dtype
        ]  # fmt: skip


def test_the_gate() -> None:
    """Far into both tails, and at zero."""
    gate = torch.cat([torch.linspace(-12, 12, 999), torch.zeros(1)])
    agree(fused.gated, lambda gate, up: F.gelu(gate) * up, gate, draw(1000))
    swiglu = partial(fused.gated, silu=True)
    agree(swiglu, lambda gate, up: F.silu(gate) * up, 9 * gate, draw(1000))
    far = torch.tensor([-3e38, -1e30, 1e30, 3e38]).repeat(8).requires_grad_()
    fused.gated(far, torch.ones(32)).sum().backward()
    assert far.grad is not None and torch.allclose(far.grad, (far > 0).float())


@pytest.mark.parametrize("classes", [7, 400])
def test_the_cross_entropy(classes: int) -> None:
    """Logits so far apart, too, that a target's chance is nothing or all."""
    logits = draw(90, classes, size=2)
    logits[30:60] *= 40
    targets = torch.arange(90) % classes
    targets[::4] = logits[::4].argmax(-1)
    agree(
        lambda x: fused.cross_entropy(x, targets)[0],
        lambda x: F.cross_entropy(x, targets, reduction="none"),
        logits,
    )
    _, hits, tops = fused.cross_entropy(logits, targets)
    assert hits.tolist() == (logits.argmax(-1) == targets).float().tolist()
    assert 0 < hits.mean() < 1
    assert torch.allclose(tops, logits.softmax(-1).amax(-1), atol=1e-5)
    logits[5, 2], targets[7], targets[8] = float("nan"), -100, classes
    logits.requires_grad_()
    losses, *_ = fused.cross_entropy(logits, targets)
    assert losses.isnan().nonzero().flatten().tolist() == [5, 7, 8]
    losses.nan_to_num().sum().backward()


def textbook(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return explicit(q, k, v, mask)


@pytest.mark.parametrize("length", [2, 17, 49, 100])
@pytest.mark.parametrize("heads, kv_heads, width", [(4, 2, 16), (3, 3, 12), (4, 1, 40)])
def test_attention(length: int, heads: int, kv_heads: int, width: int) -> None:
    """Blocks that are full or not, and widths that fill vectors or do not."""
    inputs = [
        draw(2, n, length, width).transpose(1, 2).contiguous().transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    ]
    agree(fused.causal_attention, textbook, *inputs)


def test_attention_within_documents() -> None:
    """Documents that end within a block, at its end, and one that goes over several."""
    lengths = [1, 47, 3, 80, 9], [70, 10, 60]
    documents = torch.stack(
        [torch.arange(len(each)).repeat_interleave(torch.tensor(each)) for each in lengths]
    )
    packed = VarlenBatch.of(documents)
    assert packed.first[0, [0, 1, 47, 48, 50, 51, 139]].tolist() == [0, 1, 1, 48, 48, 51, 131]
    agree(
        lambda q, k, v: fused.causal_attention(q, k, v, packed.first),
        lambda q, k, v: textbook(q, k, v, packed.mask()),
        draw(2, 4, 140, 16), draw(2, 2, 140, 16), draw(2, 2, 140, 16),
    )  # fmt: skip
    # The model's own back end takes it where it trains, and the mask where it does not.
    q, k, v = draw(2, 4, 140, 16).requires_grad_(), draw(2, 2, 140, 16), draw(2, 2, 140, 16)
    ours = sdpa(q, k, v, packed)
    assert "Attend" in type(ours.grad_fn).__name__
    with torch.no_grad():
        assert torch.allclose(sdpa(q, k, v, packed), ours, atol=1e-5)


def model() -> LoopedTransformer:
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=60, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64)
    return LoopedTransformer(shape)


def test_a_step_of_training_is_the_plain_one() -> None:
    """At every depth at once, and with documents, whose rows have tables and masks of their own."""
    tokens = torch.randint(0, 60, (6, 17), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(16) > 6).long().expand(6, -1)
    gradients = []
    for on in (True, False):
        fused.enable_fused(on)
        net = model()
        schedule = LoopSchedule(TrainConfig(loop_schedule="sampled"), 10)
        found = loop_loss(net, tokens, schedule, 0, torch.arange(6), documents=documents)
        (found.loss + found.confidence_loss).backward()
        gradients.append([p.grad for p in net.parameters()])
    for one, two in zip(*gradients):
        assert torch.allclose(one, two, atol=1e-6, rtol=1e-4)


def test_only_plain_float32_and_autocast_s_bf16_with_gradients_are_taken() -> None:
    x = torch.ones(2)
    assert fused.can_use_fused(x)
    with torch.no_grad():
        assert not fused.can_use_fused(x)
    with torch.autocast("cpu"):
        assert fused.can_use_fused(x, x.bfloat16()) and not fused.can_use_fused(x.half())
    with torch.autocast("cpu", torch.float16):
        assert not fused.can_use_fused(x)
    assert not fused.can_use_fused(x, x.double()) and not fused.can_use_fused(x.bfloat16())
    fused.enable_fused(False)
    assert not fused.can_use_fused(x)


def test_what_cannot_be_built_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "wrong.cpp"
    source.write_text("int f( {", "utf-8")
    with pytest.raises(MissingError, match=r"can't build wrong\.cpp"):
        kernels.load(source)
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernels.load.cache_clear()
    with pytest.raises(MissingError, match="no C\\+\\+ compiler"):
        kernels.load(source)
    assert fused.enable_fused().startswith("plain torch: no C++ compiler")
    kernels.load.cache_clear()


def test_freed_memory_is_kept_within_and_given_back_after() -> None:
    """A tensor's pages come from the system once, not at every use; at the end they go back."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(16, 1 << 20)  # 64 MB, above what is ever kept otherwise
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        pytest.skip("needs glibc 2.35")
    usual = faults()
    if usual < 10_000:
        pytest.skip("huge pages hide what is counted")
    with freed_memory_kept():
        faults()
        kept, held = faults(), resident()
    assert kept < 1_000
    assert resident() < held - (48 << 20)
    assert faults() > 10_000
