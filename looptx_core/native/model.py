"""A model as the kernel sees it: pointers to its weights, and its moves for some rows."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from looptx_core.errors import LooptxError, MissingError, UsageError
from looptx_core.machine.kernels import load
from looptx_core.model.attention import sdpa
from looptx_core.model.bitnet import PackedBitLinear
from looptx_core.model.block import Block
from looptx_core.model.cache import LoopCache
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.norm import RMSNorm
from looptx_core.model.rope import rotary_frequencies
from looptx_core.native.source import KERNEL

_FLOAT, _BFLOAT, _BYTES, _TERNARY = range(4)
PRECISIONS = {"float32": _FLOAT, "bf16": _BFLOAT, "int8": _BYTES}
"""How the kernel can hold a model's float weights, by name."""
_LEVELS = 127

_pointer, _int, _long, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


def _fields(**kinds: Any) -> list[tuple[str, Any]]:
    return [(name, kind) for names, kind in kinds.items() for name in names.split("__")]


# These mirror the structs of decode.cpp.


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
        blocks__state_norm__state_share__embedding_norm__embedding_share=_pointer,
        embedding__norm__frequencies=_pointer,
        head__judge_hidden__judge_gate=_Matrix,
        judge_norm__judge_bias__judge_gate_bias__judge_loop__judge_out__judge_out_bias=_pointer,
        judge_gain=_int,
    )


class _Cache(ctypes.Structure):
    _fields_ = _fields(keys__values=_pointer, slot__row__head=_long, depths=_int)


class _Rows(ctypes.Structure):
    _fields_ = _fields(count=_int, row__column__start__position=_pointer)


class _Watch(ctypes.Structure):
    _fields_ = _fields(
        first__last__sure__least=_pointer, odds__gain=_int, slope__power__offset=_pointer,
        depths=_int,
    )  # fmt: skip


class Watch:
    """When rows may leave the loop.

    first, last: for each row the loop from which on it is looked at, and the one that ends it.
    bounds: for each row the confidence head's log-odds from which on it leaves, and the nats of
    gain below which it does. asks: whether any row's leaving hangs on the one, and on the other.
    gains: `ExitSettings.gain_slope`, `gain_power` and `gain_offset`.
    """

    def __init__(
        self,
        first: Sequence[int],
        last: Sequence[int],
        bounds: Sequence[tuple[float, float]],
        asks: tuple[bool, bool],
        gains: tuple[Sequence[float], Sequence[float], Sequence[float]],
    ) -> None:
        assert len({len(part) for part in gains}) == 1, "three numbers for each loop"
        self._parts = [*map(_ints, (first, last)), *map(_floats, (*zip(*bounds), *gains))]
        addresses = [ctypes.addressof(part) for part in self._parts]
        self._watch = _Watch(*addresses[:4], *asks, *addresses[4:], len(gains[0]))
        self.argument = ctypes.byref(self._watch)


class Place:
    """Tokens of one pass, one a row, and where they stand in a cache.

    row: of the cache's batch. column: of the cache, where the token's keys go. start: the first
    column that belongs to the row. position: RoPE's. Rows of one text see each other's columns,
    as far as they are no later. The cache holds float32.
    """

    def __init__(
        self,
        cache: LoopCache,
        row: Sequence[int],
        column: Sequence[int],
        start: Sequence[int],
        position: Sequence[int],
    ) -> None:
        self._parts = [_ints(part) for part in (row, column, start, position)]
        self._rows = _Rows(len(row), *(ctypes.addressof(part) for part in self._parts))
        strides, keys, values = cache.keys.stride(), cache.keys.data_ptr(), cache.values.data_ptr()
        self._cache = _Cache(keys, values, *strides[:3], cache.depths)
        self.arguments = ctypes.byref(self._rows), ctypes.byref(self._cache)


_ERRORS = {
    -1: (UsageError, "a token id beyond the model's vocabulary"),
    -2: (UsageError, "a row or column beyond the cache"),
    -3: (UsageError, "a loop below 1"),
    -4: (LooptxError, "no memory left for a pass; give a shorter prompt or fewer prompts at once"),
    -5: (LooptxError, "the compiled kernel failed; --kernel torch does without it"),
}


def _done(status: int) -> int:
    """What a call of the kernel returned. Raises the error that a negative status stands for."""
    if status < 0:
        kind, message = _ERRORS[status]
        raise kind(message)
    return status


def obstacle(model: LoopedTransformer) -> str | None:
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


class NativeModel:
    """The moves of one model by the kernel.

    precision: how float matrices are held, see `PRECISIONS`; a ternary model keeps its own. The
    kernel reads the model's memory where the type is the same, else a copy: a later change of the
    model is not followed. Raises `MissingError` where the kernel can't be built.
    """

    def __init__(
        self, model: LoopedTransformer, precision: str = "float32", threads: int | None = None
    ) -> None:
        self._library = load(*KERNEL)
        self._library.looptx_new.restype = ctypes.c_void_p
        self._kept: list[Any] = []  # what the kernel points to
        self._kind = PRECISIONS[precision]
        self.config = model.config
        description = self._describe(model)
        handle = self._library.looptx_new(ctypes.byref(description), threads or _threads())
        if not handle:
            raise MissingError("the kernel could not start its threads, or there is no memory left")
        self._handle = ctypes.c_void_p(handle)
        weakref.finalize(self, self._library.looptx_free, self._handle)

    def encode(self, tokens: Tensor, place: Place) -> Tensor:
        """tokens (rows,) int64 -> the prelude's output (rows, d_model)."""
        out = torch.empty(len(tokens), self.config.d_model)
        _done(self._library.looptx_encode(self._handle, _at(tokens), _at(out), *place.arguments))
        return out

    def step(
        self, state: Tensor, embedding: Tensor, loops: Sequence[int], place: Place, further: int = 0
    ) -> Tensor:
        """States (rows, d_model) after each row's loop, counted from 1, and `further` ones."""
        state = state.clone()
        _done(
            self._library.looptx_step(
                self._handle, _at(state), _at(embedding), _ints(loops), further, *place.arguments
            )
        )
        return state

    def ride(
        self, state: Tensor, embedding: Tensor, loops: Sequence[int], place: Place, watch: Watch
    ) -> tuple[Tensor, int, list[tuple[float, float, float]]]:
        """Loop all rows until one may leave: the states, the passes, and of each row what `judge`
        says then and the state's relative change in the last pass. Its gain is 0 unless a row's
        leaving hangs on it.

        loops: each row's first, counted from 1.
        """
        state, out = state.clone(), (ctypes.c_float * (3 * len(state)))()
        passes = _done(self._library.looptx_ride(
            self._handle, _at(state), _at(embedding), _ints(loops), watch.argument,
            *place.arguments, out,
        ))  # fmt: skip
        return state, passes, list(zip(out[::3], out[1::3], out[2::3]))

    def decode(self, state: Tensor, place: Place) -> Tensor:
        """states (rows, d_model) -> logits (rows, vocab_size), by coda and head."""
        logits, state = torch.empty(len(state), self.config.vocab_size), state.clone()
        _done(self._library.looptx_decode(self._handle, _at(state), _at(logits), *place.arguments))
        return logits

    def leave(self, state: Tensor, embedding: Tensor, loops: Sequence[int], place: Place) -> None:
        """Rows end after their loops, with these states (rows, d_model): leave what deeper ones
        of later rows will look for."""
        _done(
            self._library.looptx_leave(
                self._handle, _at(state), _at(embedding), _ints(loops), *place.arguments
            )
        )

    def judge(self, state: Tensor, loops: Sequence[int]) -> list[tuple[float, float]]:
        """The confidence head's words after each row's loop: logit and gain."""
        out = (ctypes.c_float * (2 * len(state)))()
        _done(self._library.looptx_judge(self._handle, _at(state), _ints(loops), len(state), out))
        return list(zip(out[::2], out[1::2]))

    # What follows describes the model to the kernel.

    def _describe(self, model: LoopedTransformer) -> _Model:
        config, injection, judge = model.config, model.injection, model.confidence
        blocks = (_Block * len(_blocks(model)))(*(self._block(b) for b in _blocks(model)))
        self._kept.append(blocks)
        parts: dict[str, Any] = {}
        if judge.gate is not None:
            parts["judge_gate"] = self._matrix(judge.gate.weight, _FLOAT)
            parts["judge_gate_bias"] = self._vector(judge.gate.bias)
        out: Tensor = judge.out.weight
        out_bias: Tensor = judge.out.bias
        if judge.gain is not None:
            out = torch.block_diag(judge.gain.weight, out).flip(0)  # log-odds first
            out_bias = torch.cat([out_bias, judge.gain.bias])
        if injection.kind != "none":
            ones = torch.ones(config.d_model)
            decays = injection.kind == "decay"
            parts |= {
                "state_norm": self._vector(injection.state_norm.weight),
                "embedding_norm": self._vector(injection.embedding_norm.weight),
                "state_share": self._vector(torch.sigmoid(-injection.decay) if decays else ones),
                "embedding_share": self._vector(injection.gain if decays else ones),
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
            judge_hidden=self._matrix(judge.hidden.weight, _FLOAT),
            judge_norm=self._vector(judge.norm.weight),
            judge_bias=self._vector(judge.hidden.bias),
            judge_loop=self._vector(judge.loop.weight),
            judge_out=self._vector(out), judge_out_bias=self._vector(out_bias),
            judge_gain=judge.widths[0],
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
