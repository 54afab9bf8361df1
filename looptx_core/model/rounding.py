"""How the KV cache stores numbers: unchanged, or as integers with a scale per head and token.

An entry is the head_dim numbers of one token and head. Its scale is its largest absolute value over
the largest integer, stored in half precision. With head_dim 64 an entry takes 66 bytes as int8 and
34 as int4, against 128 in bf16 and 256 in float32 (cf. KIVI, arXiv 2402.02750).
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
        """(what is stored for x, (..., width); its scales, (..., 1), unused for floats)."""
        return x, x

    def restore(self, codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The stored numbers, (..., width)."""
        return codes


@dataclass(frozen=True)
class WholeKind:
    """Integers of 8 bits, or of 4 with two to a byte: the entry's first half in the low bits."""

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
        # Half precision first, so that the codes fit the scale that is stored.
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
"""By the value of `kv_type` in the settings."""
