"""PEFT's LoRA layer as one product, where training on a CPU can take it so."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from looptx_core.finetuning.quiet_peft import without_bitsandbytes
from looptx_core.model.products import Product, take_products

with without_bitsandbytes():
    from peft.tuners import lora


class JoinedLora(lora.Linear):
    """A `lora.Linear` that is computed with its base by `looptx_core.model.products`.

    PEFT's own way is taken for what is more than one low-rank product, such as DoRA and dropout,
    and where the products are not available.
    """

    def as_product(self) -> Product | None:
        base = self.base_layer
        active = [name for name in self.active_adapters if name in self.lora_A]
        if type(base) is not nn.Linear or base.bias is not None or self.merged or len(active) > 1:
            return None
        if self.disable_adapters or not active:
            return Product(base.weight)
        name = active[0]
        down, up = self.lora_A[name], self.lora_B[name]
        if name in self.lora_variant or up.bias is not None:
            return None
        if not isinstance(self.lora_dropout[name], nn.Identity):
            return None
        return Product(base.weight, down.weight, up.weight, float(self.scaling[name]))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        outputs = None if args or kwargs else take_products(x, [self])
        return super().forward(x, *args, **kwargs) if outputs is None else outputs[0]


def join_products(model: nn.Module) -> None:
    """Let a model's LoRA layers on plain linear layers be `JoinedLora`s, in place."""
    for module in model.modules():
        if type(module) is lora.Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = JoinedLora
