"""A float model into ternary weights (BitNet b1.58): rounded at once, or trained into it.

Rounding alone undoes what was learnt, so the weights are trained on through the rounding, which
comes in by degrees (a warm-up over the first steps).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from looptx_core.model.bitnet import BitLinear, TernaryLinear, pack, ternary
from looptx_core.model.int8 import Int8Linear
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.storage import finished, like
from looptx_core.training.evaluate import evaluate_batch


def to_ternary(
    model: LoopedTransformer, batches: Iterable[Mapping[str, Tensor]]
) -> LoopedTransformer:
    """The same weights in `BitLinear` layers.

    A layer whose input had no norm gets one; its gain starts at the root mean square that the
    input has on `batches`, over all loops, so that the layer's output keeps its size.
    """
    new = like(model, "ternary")
    state = {**model.state_dict(), **_gains(model, batches)}
    new.load_state_dict({name: t.clone() for name, t in state.items()}, assign=True)
    return finished(new, model)


def pack_model(model: LoopedTransformer) -> LoopedTransformer:
    """A model of `BitLinear` layers with its ternary weights packed; it computes the same."""
    new = like(model, "packed")
    state = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, BitLinear):
            values, scale = ternary(state.pop(f"{name}.weight"))
            state[f"{name}.packed"], state[f"{name}.scale"] = pack(values), scale
    new.load_state_dict(state, assign=True)
    return finished(new, model)


def bits_per_weight(model: LoopedTransformer) -> float:
    """Stored bits of a weight in the blocks' linear layers, scales included."""
    bits = weights = 0
    for layer in model.modules():
        if isinstance(layer, TernaryLinear):
            bits += 8 * layer.packed.numel() + 8 * layer.scale.element_size()
            weights += layer.in_features * layer.out_features
        elif isinstance(layer, Int8Linear) and layer is not model.head:
            tensors = (layer.weight, layer.weight_scale)
            bits += 8 * sum(t.numel() * t.element_size() for t in tensors)
            weights += layer.weight.numel()
    if not weights:
        linear = [m for m in model.core.modules() if isinstance(m, nn.Linear)]
        return 8.0 * linear[0].weight.element_size()
    return bits / weights


def running_bytes(model: nn.Module) -> int:
    """Bytes of the weights in memory as they run; packed ones have a byte each beside them."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    packed = [layer for layer in model.modules() if isinstance(layer, TernaryLinear)]
    products = sum(layer.out_features * (layer.in_features + 4) for layer in packed)
    return sum(t.numel() * t.element_size() for t in tensors.values()) + products


class WarmUp(L.Callback):
    """Brings the rounding in linearly over the first steps; whole from then on, and at the end."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        _set_quantised(module, min(1.0, (trainer.global_step + 1) / max(1, self.steps)))

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        _set_quantised(module, 1.0)  # what will be run is what is judged

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        _set_quantised(module, 1.0)


def _set_quantised(module: nn.Module, share: float) -> None:
    for layer in module.modules():
        if isinstance(layer, BitLinear):
            layer.quantised = share


@torch.no_grad()
def _gains(model: LoopedTransformer, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """For each layer without a norm before it, the gain of its own, by the norm's name."""
    squares: dict[str, list[Tensor]] = {}
    widths: dict[str, int] = {}
    hooks = []
    # The encoders of media stay as they are.
    kept = {layer for encoder in model.encoders().values() for layer in encoder.modules()}
    for name, layer in model.named_modules():
        if (
            isinstance(layer, nn.Linear)
            and layer not in kept
            and name.endswith(("o_proj", "down_proj"))
        ):
            seen = squares.setdefault(name, [])
            widths[name] = layer.in_features
            hooks.append(
                layer.register_forward_pre_hook(
                    lambda _, args, seen=seen: seen.append(args[0].square().mean())
                )
            )
    for batch in batches:
        evaluate_batch(model, batch, model.config.max_loops)
    for hook in hooks:
        hook.remove()
    gains = {name: torch.stack(seen).mean().sqrt() for name, seen in squares.items()}
    return {f"{name}.norm.weight": gain.expand(widths[name]) for name, gain in gains.items()}
