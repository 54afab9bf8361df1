"""How the KV cache holds its numbers: as they come, or rounded with a scale per head and token.

A scale is the entry's largest value over the largest whole number, so that an entry, head_dim
numbers of one token's head, costs its bits and one half-precision number: with 64 numbers 66 bytes
as int8 and 34 as int4, against 128 in bf16 and 256 in float32 (cf. KIVI, arXiv 2402.02750).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]
Device = torch.device | str


class FloatKind:
    """The activations' own type."""

    name = "float"

    def empty(self, shape: Shape, dtype: torch.dtype, device: Device) -> tuple[Tensor, None]:
        # Zeros, since a masked column still enters 0 * value, and 0 * NaN is NaN.
        return torch.zeros(shape, dtype=dtype, device=device), None

    def round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(what is stored of x, (..., width); its scales, (..., 1))."""
        return x, x

    def restore(self, codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What is read of them, (..., width)."""
        return codes


@dataclass(frozen=True)
class WholeKind:
    """Whole numbers of 8 bits, or of 4, two to a byte: an entry's first half in the low ones."""

    name: str
    largest: int

    @property
    def _packed(self) -> bool:
        return self.largest < 8

    def empty(self, shape: Shape, dtype: torch.dtype, device: Device) -> tuple[Tensor, Tensor]:
        width = shape[-1] // 2 if self._packed else shape[-1]
        kind = torch.uint8 if self._packed else torch.int8
        codes = torch.zeros((*shape[:-1], width), dtype=kind, device=device)
        return codes, torch.zeros((*shape[:-1], 1), dtype=torch.float16, device=device)

    def round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(codes of x, (..., width); their scales, (..., 1))."""
        # Rounded up to half precision first: the codes belong to the scale that is stored.
        scale = (x.abs().amax(-1, keepdim=True) / self.largest).half()
        scale = scale.clamp(min=torch.finfo(torch.float16).smallest_normal)
        whole = (x / scale.to(x.dtype)).round().clamp(-self.largest, self.largest)
        if not self._packed:
            return whole.to(torch.int8), scale
        low, high = (whole + 8).to(torch.uint8).chunk(2, -1)
        return low | (high << 4), scale

    def restore(self, codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The numbers that codes and scales mean, (..., width)."""
        assert scales is not None
        if self._packed:
            codes = torch.cat([codes & 15, codes >> 4], -1).to(torch.int8) - 8
        return codes * scales.to(dtype)


KINDS: dict[str, FloatKind | WholeKind] = {
    "float": FloatKind(),
    "int8": WholeKind("int8", 127),
    "int4": WholeKind("int4", 7),
}
"""By the name that `kv_type` has in the settings."""
