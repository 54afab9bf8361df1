"""Adapters on a CPU: joined products against PEFT's own layers, and frozen weights in bf16."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.model import ModelConfig
from looptx_core.finetuning.adapters import attach
from looptx_core.finetuning.lora import JoinedLora
from looptx_core.finetuning.plan import _kept
from looptx_core.finetuning.quantise import stored_bytes
from looptx_core.model import fused
from looptx_core.model.loop import LoopedTransformer
from looptx_core.parallel.memory import Activations
from looptx_core.training.frozen import cast_bytes, cast_frozen
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss

SHAPE = ModelConfig(
    vocab_size=60, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64, max_loops=2,
    activation="silu", qk_norm=False, prelude_layers=1, core_layers=1, coda_layers=1,
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("fused_kernels")


def adapted(**settings: object) -> tuple[LoopedTransformer, FinetuneConfig]:
    """A model whose adapters do something already."""
    torch.manual_seed(0)
    net = LoopedTransformer(SHAPE)
    config = FinetuneConfig(lora=True, lora_rank=4, loop_schedule="fixed", **settings)
    attach(net, config)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return net.train(), config


def bf16() -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16)


def gradients(net: LoopedTransformer, config: FinetuneConfig) -> dict[str, Tensor]:
    tokens = torch.randint(0, 60, (4, 17), generator=torch.Generator().manual_seed(0))
    schedule = LoopSchedule(config, SHAPE.max_loops)
    found = loop_loss(net, tokens, schedule, 0, torch.arange(4))
    (found.loss + found.confidence_loss).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_layers": "later"}, {"lora_per_loop": True}, {"dora": True}, {"lora_dropout": 0.5}],
)
def test_joined_products_are_peft_s_own(settings: dict[str, object]) -> None:
    each = []
    for on in (True, False):
        fused.enable_fused(on)
        net, config = adapted(**settings)
        torch.manual_seed(3)  # of dropout
        each.append(gradients(net, config))
    assert each[0].keys() == each[1].keys() and len(each[0]) > 6
    for name, one in each[0].items():
        assert torch.allclose(one, each[1][name], atol=1e-5, rtol=1e-3), name
    layers = [module for module in net.modules() if isinstance(module, JoinedLora)]
    plain = settings.keys() & {"dora", "lora_dropout"}
    assert layers and all((layer.as_product() is None) == bool(plain) for layer in layers)


def test_below_the_first_adapter_nothing_is_kept_for_a_backward_pass() -> None:
    net, _ = adapted(lora_layers="core")
    tokens = torch.zeros(1, 4, dtype=torch.long)
    assert not net.embed(tokens, net.context(4)).requires_grad
    assert net(tokens).logits.requires_grad
    parts = Activations(prelude=5, loops=[30, 200], again=0, heads=1000, logits=0)
    for layers, kept in (("core", 1230), ("later", 1200), ("all", 1235)):
        net, config = adapted(lora_layers=layers)
        assert _kept(net, config, parts) == kept
    net, _ = adapted(lora_layers="later")
    first, second = net.states(tokens, 2)
    assert not first.requires_grad and second.requires_grad


def test_bf16_with_kernels_is_near_float32_and_frozen_weights_are_cast_to_the_bit() -> None:
    net, config = adapted()
    exact = gradients(net, config)
    found = []
    for cast in (False, True):
        net, config = adapted()
        if cast:
            change, before = cast_bytes(net, torch.bfloat16), stored_bytes(net)
            cast_frozen(net, torch.bfloat16)
            assert stored_bytes(net) - before == change < 0 == cast_bytes(net, torch.bfloat16)
        with bf16():
            found.append(gradients(net, config))
    for name, one in found[0].items():
        assert torch.equal(one, found[1][name]), name
        if "confidence" not in name:
            assert float((one - exact[name]).norm() / exact[name].norm()) < 0.1, name
    assert net.embedding.weight.dtype == torch.float32
    assert net.head.weight.dtype == torch.bfloat16
    cast_frozen(net, torch.float32)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
