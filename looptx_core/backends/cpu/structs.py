"""What crosses into the compiled kernel: structs, and the objects that own their memory."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from looptx_core.backends.cpu.source import KERNEL
from looptx_core.errors import LooptxError, MissingError, UsageError
from looptx_core.machine.kernels import load
from looptx_core.model.cache import LoopCache
from looptx_core.model.layer_state import KVState
from looptx_core.model.memory_state import MemoryState, WindowState

FLOAT, BFLOAT, BYTES, TERNARY, BFLOAT_TILES = range(5)
PRECISIONS = {"float32": FLOAT, "bf16": BFLOAT, "int8": BYTES}
"""How the kernel can hold a model's float weights, by name."""

NO_INJECTION, BY_CHANNEL, BRIDGE, NORM, HALF_STEPS = range(5)
"""`ModelWeights.injection`."""

NO_MEMORY, INFINI, INFINI_DELTA, DELTA = range(4)
"""`ModelWeights.memory`."""

_pointer, _int, _long, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


def _fields(**kinds: Any) -> list[tuple[str, Any]]:
    return [(name, kind) for names, kind in kinds.items() for name in names.split("__")]


# These mirror the structs of decode.cpp; `_library` compares their sizes.


class Matrix(ctypes.Structure):
    _fields_ = _fields(data__scales=_pointer, rows__width__kind=_int)


class BlockWeights(ctypes.Structure):
    _fields_ = _fields(
        q__k__v__o__gate__up__down=Matrix,
        attention_norm__mlp_norm__q_norm__k_norm__o_norm__down_norm=_pointer,
        q_bias__k_bias__v_bias=_pointer,
        gate_bias__gate_weight__write_weight__write_bias=_pointer,
    )


class ModelWeights(ctypes.Structure):
    _fields_ = _fields(
        d_model__heads__kv_heads__head_dim__d_ff__vocab=_int,
        prelude__core__coda__max_loops__silu__injection=_int,
        memory__memory_window__memory_block=_int,
        eps=_float,
        blocks__state_norm__state_scale__embedding_norm__embedding_scale=_pointer,
        embedding__norm__frequencies=_pointer,
        bridge__head__confidence_hidden__confidence_gate=Matrix,
        confidence_norm__confidence_bias__confidence_gate_bias__confidence_loop=_pointer,
        confidence_out__confidence_out_bias=_pointer,
        gain_units=_int,
    )


class _Cache(ctypes.Structure):
    _fields_ = _fields(
        keys__values=_pointer, depth__row__head=_long, depths__memories__axes=_int,
        positions__matrix__norm__document=_pointer,
    )  # fmt: skip


class _Rows(ctypes.Structure):
    _fields_ = _fields(count=_int, row__column__start__position=_pointer)


class _StopCondition(ctypes.Structure):
    _fields_ = _fields(
        first__last__min_odds__max_nats=_pointer, odds__gain=_int, slope__power__offset=_pointer,
        depths=_int,
    )  # fmt: skip


_ABI_VERSION = 6
"""Of the structs and functions; `LOOPTX_ABI_VERSION` of decode.cpp."""
_STRUCTS = (Matrix, BlockWeights, ModelWeights, _Cache, _Rows, _StopCondition)


def load_kernel() -> ctypes.CDLL:
    """The compiled kernel. Raises `MissingError` where it can't be built, or where its structs are
    not laid out as these here."""
    library = load(*KERNEL)
    found = (_int * (1 + len(_STRUCTS)))()
    library.looptx_layout(found)
    expected = [_ABI_VERSION, *map(ctypes.sizeof, _STRUCTS)]
    if list(found) != expected:
        raise MissingError(
            f"the compiled kernel's structs are laid out as {list(found)}, not as {expected}: "
            "it was built from another source; remove it, and it is built anew"
        )
    library.looptx_new.restype = ctypes.c_void_p
    return library


class StopCondition:
    """When the kernel's loop returns.

    first, last: for each row the loop from which on its exit is checked, and the one that ends it.
    thresholds: `Exit.kernel_thresholds` of each row. asks: whether any row's exit looks at the
    log-odds, and at the gain. gains: `ExitSettings.gain_slope`, `gain_power` and `gain_offset`.
    """

    def __init__(
        self,
        first: Sequence[int],
        last: Sequence[int],
        thresholds: Sequence[tuple[float, float]],
        asks: tuple[bool, bool],
        gains: tuple[Sequence[float], Sequence[float], Sequence[float]],
    ) -> None:
        assert len({len(part) for part in gains}) == 1, "three numbers for each loop"
        self._parts = [*map(ints, (first, last)), *map(floats, (*zip(*thresholds), *gains))]
        addresses = [ctypes.addressof(part) for part in self._parts]
        struct = _StopCondition(*addresses[:4], *asks, *addresses[4:], len(gains[0]))
        self.argument = ctypes.byref(struct)


class KernelCache:
    """A cache's memory: keys and values of each layer, float32, and what the core has folded."""

    def __init__(self, cache: LoopCache, states: Sequence[KVState]) -> None:
        self._of, self._first = weakref.ref(cache), states[0].keys
        strides, depths = states[0].keys.stride(), max(state.depths for state in states)
        memories = [state.memory for state in states if isinstance(state, MemoryState)]
        self._tables = [
            _addresses([state.keys for state in states]),
            _addresses([state.values for state in states]),
            _addresses([memory.matrix for memory in memories]),
            _addresses([memory.norm for memory in memories]),
            _addresses([memory.document for memory in memories]),
        ]
        keys, values, *folded = map(ctypes.addressof, self._tables)
        count = len(memories[0].document) if memories else 0
        positions = cache.positions
        self.struct = _Cache(
            keys, values, *strides[:3], depths, count, len(positions), positions.data_ptr(), *folded
        )

    @classmethod
    def of(cls, cache: LoopCache) -> KernelCache | None:
        """None where the kernel can't read it: a layer that holds something else than keys, values
        and memories, or holds them rounded or in another type."""
        states = [state for state in cache.layers if isinstance(state, KVState)]
        known = len(states) == len(cache.layers) and {*map(type, states)} <= _STATES
        plain = all(state.is_plain and state.dtype == torch.float32 for state in states)
        return cls(cache, states) if known and plain else None

    def is_of(self, cache: LoopCache) -> bool:
        """Whether it describes this cache as it is now."""
        first = cache.layers[0]
        return self._of() is cache and isinstance(first, KVState) and first.keys is self._first


_STATES = {KVState, WindowState, MemoryState}


def _addresses(tensors: Sequence[Tensor]) -> Any:
    """Of their memory; none for those without elements."""
    return (_pointer * len(tensors))(*(each.data_ptr() or None for each in tensors))


class KernelRows:
    """Tokens of one pass, one a row, and where they stand in a cache.

    row: of the cache's batch. column: of the cache, where the token's keys go. start: the first
    column that belongs to the row. position: RoPE's. Rows of one text see each other's columns,
    as far as they are no later.
    """

    def __init__(
        self,
        cache: KernelCache,
        row: Sequence[int],
        column: Sequence[int],
        start: Sequence[int],
        position: Sequence[int],
    ) -> None:
        self._parts = [ints(part) for part in (row, column, start, position)]
        self._rows = _Rows(len(row), *(ctypes.addressof(part) for part in self._parts))
        self._cache = cache
        self.arguments = ctypes.byref(self._rows), ctypes.byref(cache.struct)


_ERRORS = {
    -1: (UsageError, "a token id beyond the model's vocabulary"),
    -2: (UsageError, "a row or column beyond the cache"),
    -3: (UsageError, "a loop below 1"),
    -4: (LooptxError, "no memory left for a pass; give a shorter prompt or fewer prompts at once"),
    -5: (LooptxError, "the compiled kernel failed; `kernel` torch does without it"),
}


def check_status(status: int) -> int:
    """What a call of the kernel returned. Raises the error that a negative status stands for."""
    if status < 0:
        kind, message = _ERRORS[status]
        raise kind(message)
    return status


def ints(values: Sequence[int]) -> Any:
    return (_int * len(values))(*values)


def floats(values: Sequence[float]) -> Any:
    return (_float * len(values))(*values)
