"""Ternary linear layers: BitLinear of BitNet b1.58 (arXiv 2402.17764), to train and to run.

    y = int8(norm(x)) ternary(W)^T

- Weights: s round(W / s) clipped to -1, 0, 1, with s the mean of |W| over the matrix.
- Activations: 127 levels on either side of 0, by token, up to the token's largest.
- The norm: RMSNorm inside the layer. Projections whose input is normalised already, as those of
  queries, keys and values, have none of their own.

`BitLinear` trains latent float weights with gradients straight through the rounding.
`TernaryLinear` packs four ternary weights into a byte, and multiplies integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PER_BYTE = 4
_SMALLEST = 1e-5
_CUDA_ROWS = 32  # its whole-number product takes no fewer than 17


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(-1, 0 or 1 for each weight, as floats; their scale, a scalar)."""
    scale = weight.abs().mean().clamp(min=_SMALLEST)
    return (weight / scale).round().clamp(-1, 1), scale


def int8_by_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers from -127 to 127, as floats; their scale, (..., 1)), x: (..., width)."""
    scale = x.abs().amax(-1, keepdim=True).clamp_(min=_SMALLEST) / 127
    return (x / scale).round_(), scale


def pack(values: Tensor) -> Tensor:
    """-1, 0 and 1, (out, in), four to a byte: (out, ceil(in / 4)) uint8; rows are padded by 0."""
    rows, width = values.shape
    codes = (F.pad(values, (0, -width % _PER_BYTE)) + 1).to(torch.uint8)
    parts = codes.view(rows, -1, _PER_BYTE)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=values.device)
    return (parts << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, width: int) -> Tensor:
    """The inverse of `pack`, as int8."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    codes = (packed[..., None] >> shifts) & 3
    return codes.flatten(1)[:, :width].to(torch.int8) - 1


class BitLinear(nn.Linear):
    """Trains ternary weights. `quantised` below 1 blends them with float ones, for a warm-up."""

    quantised: float = 1.0

    def __init__(self, in_features: int, out_features: int, norm: nn.Module) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features)."""
        x = self.norm(x)
        return F.linear(self._through(x, int8_by_token), self._through(self.weight, ternary))

    def _through(self, x: Tensor, rounding: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """x rounded, with a straight-through gradient (arXiv 1308.3432)."""
        with torch.no_grad():
            values, scale = rounding(x)
            error = (values * scale - x) * self.quantised
        return x + error


class TernaryLinear(nn.Module):
    """`BitLinear` for inference: `packed`, (out, ceil(in / 4)) uint8, and `scale`, a scalar.

    The first call unpacks the weights to one byte each. Float weights are made only if a gradient
    is needed.
    """

    packed: Tensor
    scale: Tensor
    _product: IntegerProduct | None = None

    def __init__(self, in_features: int, out_features: int, norm: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features, self.norm = in_features, out_features, norm
        width = -(-in_features // _PER_BYTE)
        self.register_buffer("packed", torch.zeros(out_features, width, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features)."""
        x = self.norm(x)
        if torch.is_grad_enabled() and x.requires_grad:  # whole numbers have no gradient
            values, scale = int8_by_token(x.detach())
            x = x + (values * scale - x).detach()
            return F.linear(x, unpack(self.packed, self.in_features).to(x.dtype) * self.scale)
        if self._product is None:
            self._product = IntegerProduct([self])
        return self._product(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TernaryLinear:
        self._product = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, 2 bits a weight"


class IntegerProduct:
    """The product of int8 activations with the ternary rows of layers that read one input."""

    def __init__(self, layers: Sequence[TernaryLinear]) -> None:
        with torch.inference_mode(False):
            parts = [unpack(layer.packed, layer.in_features) for layer in layers]
            scales = [layer.scale.expand(layer.out_features) for layer in layers]
            self.weights, self.scales = torch.cat(parts), torch.cat(scales)

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        values, scale = int8_by_token(x)
        whole = _whole_product(values.flatten(0, -2), self.weights)
        return whole.view(*x.shape[:-1], -1) * (scale * self.scales)


def _whole_product(values: Tensor, weights: Tensor) -> Tensor:
    """The exact product of values, (rows, in) integers as floats, and weights.T, (out, in) int8."""
    rows, (wide, deep) = len(values), weights.shape
    if values.device.type == "cpu":
        return torch._int_mm(values.to(torch.int8), weights.t())
    if values.device.type == "cuda" and wide % 8 == deep % 8 == 0:
        padded = F.pad(values.to(torch.int8), (0, 0, 0, max(0, _CUDA_ROWS - rows)))
        return torch._int_mm(padded, weights.t())[:rows]
    # Sums of so few whole numbers are exact in float32 too.
    return F.linear(values.float(), weights.float())
