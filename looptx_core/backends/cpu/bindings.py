"""A model, a cache and a pass as the kernel sees them: pointers, shapes and numbers."""

from __future__ import annotations

import copy
import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from looptx_core.backends.cpu.source import KERNEL
from looptx_core.errors import MissingError
from looptx_core.machine.kernels import load
from looptx_core.model.attention import sdpa
from looptx_core.model.bitnet import PackedBitLinear
from looptx_core.model.block import Block
from looptx_core.model.cache import LoopCache
from looptx_core.model.layer_state import KVState
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.norm import RMSNorm
from looptx_core.model.rope import rotary_frequencies

_FLOAT, _BFLOAT, _BYTES, _TERNARY = range(4)
PRECISIONS = {"float32": _FLOAT, "bf16": _BFLOAT, "int8": _BYTES}
"""How the kernel can hold a model's float weights, by name."""
_LEVELS = 127

_pointer, _int, _long, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


def _fields(**kinds: Any) -> list[tuple[str, Any]]:
    return [(name, kind) for names, kind in kinds.items() for name in names.split("__")]


# These mirror the structs of decode.cpp; `_library` compares their sizes.


class _Matrix(ctypes.Structure):
    _fields_ = _fields(data__scales=_pointer, rows__width__kind=_int)


class _Block(ctypes.Structure):
    _fields_ = _fields(
        q__k__v__o__gate__up__down=_Matrix,
        attention_norm__mlp_norm__q_norm__k_norm__o_norm__down_norm=_pointer,
    )


class _Model(ctypes.Structure):
    _fields_ = _fields(
        d_model__heads__kv_heads__head_dim__d_ff__vocab=_int,
        prelude__core__coda__max_loops__silu__injection=_int,
        eps=_float,
        blocks__state_norm__state_scale__embedding_norm__embedding_scale=_pointer,
        embedding__norm__frequencies=_pointer,
        head__confidence_hidden__confidence_gate=_Matrix,
        confidence_norm__confidence_bias__confidence_gate_bias__confidence_loop=_pointer,
        confidence_out__confidence_out_bias=_pointer,
        gain_units=_int,
    )


class _Cache(ctypes.Structure):
    _fields_ = _fields(keys__values=_pointer, depth__row__head=_long, depths=_int)


class _Rows(ctypes.Structure):
    _fields_ = _fields(count=_int, row__column__start__position=_pointer)


class _StopCondition(ctypes.Structure):
    _fields_ = _fields(
        first__last__min_odds__max_nats=_pointer, odds__gain=_int, slope__power__offset=_pointer,
        depths=_int,
    )  # fmt: skip


_ABI_VERSION = 2
"""Of the structs and functions; `LOOPTX_ABI_VERSION` of decode.cpp."""
_STRUCTS = (_Matrix, _Block, _Model, _Cache, _Rows, _StopCondition)


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
        self._parts = [*map(_ints, (first, last)), *map(_floats, (*zip(*thresholds), *gains))]
        addresses = [ctypes.addressof(part) for part in self._parts]
        struct = _StopCondition(*addresses[:4], *asks, *addresses[4:], len(gains[0]))
        self.argument = ctypes.byref(struct)


class KernelCache:
    """A cache's memory: keys and values of each layer, float32."""

    def __init__(self, cache: LoopCache, states: Sequence[KVState]) -> None:
        self._of, self._first = weakref.ref(cache), states[0].keys
        self._keys, self._values = (
            (_pointer * len(states))(*(store.data_ptr() for store in stores))
            for stores in zip(*((state.keys, state.values) for state in states))
        )
        strides, depths = states[0].keys.stride(), max(state.depths for state in states)
        tables = ctypes.addressof(self._keys), ctypes.addressof(self._values)
        self.struct = _Cache(*tables, *strides[:3], depths)

    @classmethod
    def of(cls, cache: LoopCache) -> KernelCache | None:
        """None where the kernel can't read it: a layer that holds something else than keys and
        values, or holds them rounded or in another type."""
        states = [state for state in cache.layers if type(state) is KVState]
        plain = all(state.is_plain and state.dtype == torch.float32 for state in states)
        return cls(cache, states) if plain and len(states) == len(cache.layers) else None

    def is_of(self, cache: LoopCache) -> bool:
        """Whether it describes this cache as it is now."""
        first = cache.layers[0]
        return self._of() is cache and isinstance(first, KVState) and first.keys is self._first


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
        self._parts = [_ints(part) for part in (row, column, start, position)]
        self._rows = _Rows(len(row), *(ctypes.addressof(part) for part in self._parts))
        self._cache = cache
        self.arguments = ctypes.byref(self._rows), ctypes.byref(cache.struct)


def unsupported_reason(model: LoopedTransformer) -> str | None:
    """Why the kernel can't run this model, in a few words; None where it can."""
    weight = model.norm.weight
    if weight.device.type != "cpu":
        return f"the model is on {weight.device.type}"
    if weight.dtype != torch.float32:
        return f"the model is in {str(weight.dtype).removeprefix('torch.')}"
    if model.attend is not sdpa:
        return "attention is not sdpa's"
    if model.enter_loop is not None:
        return "each loop has an adapter of its own"
    kinds = {type(layer) for block in _blocks(model) for layer in _layers(block)}
    if kinds not in ({nn.Linear}, {PackedBitLinear}) or type(model.head) is not nn.Linear:
        return f"its layers are {', '.join(sorted(kind.__name__ for kind in kinds))}"
    if model.config.head_dim > 1024:
        return "its heads are too wide"
    return None


class KernelModel:
    """One model's weights, and its parts by the kernel.

    precision: how float matrices are held, see `PRECISIONS`; a ternary model keeps its own. The
    kernel reads the model's memory where the type is the same, else a copy: a later change of the
    model is not followed. Raises `MissingError` where the kernel can't be built.
    """

    def __init__(
        self, model: LoopedTransformer, precision: str = "float32", threads: int | None = None
    ) -> None:
        self._library = load_kernel()
        self._kept: list[Any] = []  # what the kernel points to
        self._kind = PRECISIONS[precision]
        self.config = model.config
        description = self._describe(model)
        handle = self._library.looptx_new(ctypes.byref(description), threads or _threads())
        self._handle = ctypes.c_void_p(handle)
        weakref.finalize(self, self._library.looptx_free, self._handle)

    def embed(self, tokens: Tensor, rows: KernelRows) -> Tensor:
        """tokens (rows,) int64 -> the prelude's output (rows, d_model)."""
        out = torch.empty(len(tokens), self.config.d_model)
        self._library.looptx_embed(self._handle, _at(tokens), _at(out), *rows.arguments)
        return out

    def iterate(
        self,
        state: Tensor,
        embedding: Tensor,
        loops: Sequence[int],
        rows: KernelRows,
        count: int = 1,
    ) -> Tensor:
        """States (rows, d_model) after `count` loops, of which each row's first is given."""
        state = state.clone()
        self._library.looptx_iterate(
            self._handle, _at(state), _at(embedding), _ints(loops), count, *rows.arguments
        )
        return state

    def until_exit(
        self,
        state: Tensor,
        embedding: Tensor,
        loops: Sequence[int],
        rows: KernelRows,
        stop: StopCondition,
    ) -> tuple[Tensor, int, list[tuple[float, float, float]]]:
        """Loop all rows until one may stop: the states, the passes of the core, and for each row
        the confidence head's log-odds and gain and the state's relative change in the last pass.
        The gain is 0 unless a row's exit looks at it.

        loops: each row's first, counted from 1.
        """
        state, out = state.clone(), (ctypes.c_float * (3 * len(state)))()
        passes = self._library.looptx_until_exit(
            self._handle, _at(state), _at(embedding), _ints(loops), stop.argument,
            *rows.arguments, out,
        )  # fmt: skip
        return state, passes, list(zip(out[::3], out[1::3], out[2::3]))

    def logits(self, state: Tensor, rows: KernelRows) -> Tensor:
        """states (rows, d_model) -> logits (rows, vocab_size), by coda and head."""
        logits, state = torch.empty(len(state), self.config.vocab_size), state.clone()
        self._library.looptx_logits(self._handle, _at(state), _at(logits), *rows.arguments)
        return logits

    def backfill(
        self, state: Tensor, embedding: Tensor, loops: Sequence[int], rows: KernelRows
    ) -> None:
        """Rows exit after their loops, with these states (rows, d_model): write what deeper, later
        rows will attend to."""
        self._library.looptx_backfill(
            self._handle, _at(state), _at(embedding), _ints(loops), *rows.arguments
        )

    def confidence(self, state: Tensor, loops: Sequence[int]) -> list[tuple[float, float]]:
        """The confidence head's log-odds and gain after each row's loop."""
        out = (ctypes.c_float * (2 * len(state)))()
        self._library.looptx_confidence(self._handle, _at(state), _ints(loops), len(state), out)
        return list(zip(out[::2], out[1::2]))

    # What follows describes the model to the kernel.

    def _describe(self, model: LoopedTransformer) -> _Model:
        config, injection, head = model.config, model.injection, model.confidence
        blocks = (_Block * len(_blocks(model)))(*(self._block(b) for b in _blocks(model)))
        self._kept.append(blocks)
        parts: dict[str, Any] = {}
        if injection.kind != "none":
            ones = torch.ones(config.d_model)
            decays = injection.kind == "decay"
            parts |= {
                "state_norm": self._vector(injection.state_norm.weight),
                "embedding_norm": self._vector(injection.embedding_norm.weight),
                "state_scale": self._vector(torch.sigmoid(-injection.decay) if decays else ones),
                "embedding_scale": self._vector(injection.gain if decays else ones),
            }
        return _Model(
            d_model=config.d_model, heads=config.n_heads, kv_heads=config.n_kv_heads,
            head_dim=config.head_dim, d_ff=config.d_ff, vocab=config.vocab_size,
            prelude=config.prelude_layers, core=config.core_layers, coda=config.coda_layers,
            max_loops=config.max_loops, silu=config.activation == "silu",
            injection=injection.kind != "none", eps=config.norm_eps,
            blocks=ctypes.addressof(blocks), **parts,
            embedding=self._vector(model.embedding.weight), norm=self._vector(model.norm.weight),
            frequencies=self._vector(rotary_frequencies(config.head_dim, config.rope_theta)),
            head=self._matrix(model.head.weight, self._kind),
            confidence_hidden=self._matrix(head.hidden.weight, _FLOAT),
            confidence_gate=self._matrix(head.gate.weight, _FLOAT),
            confidence_norm=self._vector(head.norm.weight),
            confidence_bias=self._vector(head.hidden.bias),
            confidence_gate_bias=self._vector(head.gate.bias),
            confidence_loop=self._vector(head.loop.weight),
            confidence_out=self._vector(torch.cat([head.gain.weight, head.out.weight], 1)),
            confidence_out_bias=self._vector(torch.cat([head.out.bias, head.gain.bias])),
            gain_units=head.widths[0],
        )  # fmt: skip

    def _block(self, block: Block) -> _Block:
        attention, mlp = block.attention, block.mlp
        named = {
            "q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj,
            "o": attention.o_proj, "gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj,
        }  # fmt: skip
        norms = {
            "attention_norm": block.attention_norm, "mlp_norm": block.mlp_norm,
            "q_norm": attention.q_norm, "k_norm": attention.k_norm,
            "o_norm": getattr(attention.o_proj, "norm", None),
            "down_norm": getattr(mlp.down_proj, "norm", None),
        }  # fmt: skip
        return _Block(
            **{name: self._layer(layer) for name, layer in named.items()},
            **{
                name: self._vector(norm.weight)
                for name, norm in norms.items()
                if isinstance(norm, RMSNorm)
            },
        )

    def _layer(self, layer: nn.Module) -> _Matrix:
        if isinstance(layer, PackedBitLinear):
            packed, scale = self._keep(_in_fours(layer.packed)), self._vector(layer.scale)
            return _Matrix(packed, scale, layer.out_features, layer.in_features, _TERNARY)
        assert isinstance(layer, nn.Linear)
        return self._matrix(layer.weight, self._kind)

    def _matrix(self, weight: Tensor, kind: int) -> _Matrix:
        rows, width = weight.shape
        scales = None
        if kind == _BFLOAT:
            weight = weight.bfloat16()
        elif kind == _BYTES:
            values, scale = rounded_rows(weight)
            weight, scales = _in_fours(values.to(torch.int8)), self._vector(scale)
        return _Matrix(self._keep(weight), scales, rows, width, kind)

    def _vector(self, values: Tensor) -> int:
        return self._keep(values.float())

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def rounded_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers from -127 to 127, as floats; the rows' scales (rows, 1)), by largest value."""
    scale = weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-12) / _LEVELS
    return (weight.detach() / scale).round(), scale


@torch.no_grad()
def round_weights(model: LoopedTransformer, precision: str) -> None:
    """Give the model the values that the kernel will hold, so that both compute the same."""
    layers = [layer for block in _blocks(model) for layer in _layers(block)]
    for layer in (*layers, model.head):
        if not isinstance(layer, nn.Linear):
            continue
        if precision == "bf16":
            layer.weight.copy_(layer.weight.bfloat16())
        elif precision == "int8":
            values, scale = rounded_rows(layer.weight)
            layer.weight.copy_(values * scale)


def rounded_copy(model: LoopedTransformer, precision: str) -> LoopedTransformer:
    """A copy with the values that the kernel will hold; in float32 the model itself."""
    if precision == "float32":
        return model
    copied = copy.deepcopy(model)
    copied.join()  # the copied projections were still those of the model
    round_weights(copied, precision)
    return copied


def _blocks(model: LoopedTransformer) -> list[Block]:
    return [*model.prelude, *model.core, *model.coda]


def _layers(block: Block) -> list[nn.Module]:
    a, m = block.attention, block.mlp
    return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]


def _in_fours(values: Tensor) -> Tensor:
    """(rows, bytes), with rows of 0 up to a multiple of four."""
    return nn.functional.pad(values, (0, 0, 0, -len(values) % 4))


def _threads() -> int:
    return max(1, torch.get_num_threads())


def _at(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous(), "the kernel reads memory as it lies"
    return ctypes.c_void_p(tensor.data_ptr())


def _ints(values: Sequence[int]) -> Any:
    return (_int * len(values))(*values)


def _floats(values: Sequence[float]) -> Any:
    return (_float * len(values))(*values)


def held_bytes(model: LoopedTransformer, precision: str = "float32") -> int:
    """Bytes of weights that decoding a token reads, each once, as the kernel holds them."""
    width = {"float32": 4, "bf16": 2, "int8": 1}[precision]
    total = model.head.weight.numel() * width
    for block in _blocks(model):
        for layer in _layers(block):
            if isinstance(layer, PackedBitLinear):
                total += layer.packed.nbytes
            elif isinstance(layer, nn.Linear):
                total += layer.weight.numel() * width
    return total
