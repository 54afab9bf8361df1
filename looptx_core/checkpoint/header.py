"""What a safetensors file holds, by its header alone: names, types and shapes.

Read here, without torch, so that a folder can be judged before anything of its size is built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from looptx_core.documents import open_input, parse_json
from looptx_core.errors import DataError

MOST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
_SAVE_AGAIN = "copy or save the model again"


class Stored(NamedTuple):
    """A tensor in a file."""

    dtype: str
    """As in the header: 'F32', 'BF16', 'U8' and so on."""
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        return "F" in self.dtype


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name.

    Raises `DataError` for a file that is cut short, too long, or contradicts itself.
    """

    def need(ok: bool, reason: str) -> None:
        if not ok:
            raise DataError(f"{file}: not a whole safetensors file ({reason}); {_SAVE_AGAIN}")

    try:
        with open_input(file, pipes=False) as data:
            size = file.stat().st_size
            length = int.from_bytes(data.read(8), "little")
            need(size >= 8, "shorter than its header")
            need(length <= min(MOST_HEADER, size - 8), "shorter than its header says")
            raw = data.read(length)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {_SAVE_AGAIN}") from error
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = ""
    need(text.startswith("{"), "its header is not JSON")
    header = parse_json(text, f"{file}: its header", mend=_SAVE_AGAIN)
    found, end = {}, 0
    for name, facts in header.items():
        if name != "__metadata__":
            found[name], stop = _stored(facts)
            need(found[name] is not None, f"{name[:60]} is described wrongly")
            end = max(end, stop)
    need(8 + length + end == size, f"{size:,} bytes where its header says {8 + length + end:,}")
    return found  # type: ignore[return-value]


def _stored(facts: Any) -> tuple[Stored | None, int]:
    """The tensor that one entry describes, None for one that makes no sense, and its end."""
    match facts:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            whole = all(type(n) is int and 0 <= n < 2**48 for n in shape)
            sound = whole and dtype in _BITS and 0 <= start <= stop < 2**60
            if sound and 8 * (stop - start) == math.prod(shape) * _BITS[dtype]:
                return Stored(dtype, tuple(shape)), stop
    return None, 0


def total_elements(header: Mapping[str, Stored]) -> int:
    """Numbers that the tensors hold, together."""
    return sum(math.prod(tensor.shape) for tensor in header.values())
