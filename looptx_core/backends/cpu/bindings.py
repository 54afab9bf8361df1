"""A model as the kernel sees it, and its parts by the kernel."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from looptx_core.backends.cpu.rounding import all_blocks, block_layers
from looptx_core.backends.cpu.structs import (
    BFLOAT,
    BFLOAT_TILES,
    BRIDGE,
    BY_CHANNEL,
    BYTES,
    DELTA,
    FLOAT,
    HALF_STEPS,
    INFINI,
    INFINI_DELTA,
    NO_INJECTION,
    NO_MEMORY,
    NORM,
    PRECISIONS,
    TERNARY,
    BlockWeights,
    KernelCache,
    KernelRows,
    Matrix,
    ModelWeights,
    StopCondition,
    check_status,
    ints,
    load_kernel,
)
from looptx_core.config.model import ModelConfig
from looptx_core.errors import MissingError
from looptx_core.model.attention import sdpa
from looptx_core.model.bitnet import TernaryLinear
from looptx_core.model.block import Block
from looptx_core.model.int8 import Int8Embedding, Int8Linear, int8_by_row
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.norm import RMSNorm
from looptx_core.model.rope import rotary_frequencies

_MEMORIES = {"none": NO_MEMORY, "infini": INFINI, "delta": DELTA}
_INJECTIONS = {
    "none": NO_INJECTION, "bridge": BRIDGE, "half_steps": HALF_STEPS, "norm": NORM,
}  # fmt: skip
_KNOWN = {nn.Linear, TernaryLinear, Int8Linear}


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
    kinds = {type(layer) for block in all_blocks(model) for layer in block_layers(block)}
    if len(kinds) > 1 or not kinds <= _KNOWN or type(model.head) not in (nn.Linear, Int8Linear):
        return f"its layers are {', '.join(sorted(kind.__name__ for kind in kinds))}"
    if model.injection.kind == "streams":
        return "its loops hand on several streams"
    if model.config.norm_position != "before":
        return "norms stand after attention and feed-forward layers"
    if model.config.local_attention.window:
        return "some of its layers attend within a window"
    if model.config.activation == "gelu_tanh":
        return "its gates have the gelu by tanh"
    if model.config.qk_norm and model.config.qk_norm_over == "all":
        return "queries and keys are normed over all heads"
    if model.config.head_dim > 1024:
        return "its heads are too wide"
    return None


class KernelModel:
    """One model's weights, and its parts by the kernel.

    precision: how float matrices are held, see `PRECISIONS`; ternary and int8 ones stay. The
    kernel reads the model's memory where the type is the same, else a copy: a later change of the
    model is not followed. Raises `MissingError` where the kernel can't be built.
    """

    def __init__(
        self, model: LoopedTransformer, precision: str = "float32", threads: int | None = None
    ) -> None:
        self._library = load_kernel()
        self._kept: list[Any] = []  # what the kernel points to
        self._kind = PRECISIONS[precision]
        if self._kind == BFLOAT and self._library.looptx_has_tiles():
            self._kind = BFLOAT_TILES
        self.config = model.config
        description = self._describe(model)
        handle = self._library.looptx_new(ctypes.byref(description), threads or _threads())
        if not handle:
            raise MissingError("the kernel could not start its threads, or there is no memory left")
        self._handle = ctypes.c_void_p(handle)
        weakref.finalize(self, self._library.looptx_free, self._handle)

    def embed(self, tokens: Tensor, rows: KernelRows) -> Tensor:
        """tokens (rows,) int64 -> the prelude's output (rows, d_model)."""
        out = torch.empty(len(tokens), self.config.d_model)
        check_status(
            self._library.looptx_embed(self._handle, _at(tokens), _at(out), *rows.arguments)
        )
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
        check_status(
            self._library.looptx_iterate(
                self._handle, _at(state), _at(embedding), ints(loops), count, *rows.arguments
            )
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
        passes = check_status(self._library.looptx_until_exit(
            self._handle, _at(state), _at(embedding), ints(loops), stop.argument,
            *rows.arguments, out,
        ))  # fmt: skip
        return state, passes, list(zip(out[::3], out[1::3], out[2::3]))

    def logits(self, state: Tensor, rows: KernelRows) -> Tensor:
        """states (rows, d_model) -> logits (rows, vocab_size), by coda and head."""
        logits, state = torch.empty(len(state), self.config.vocab_size), state.clone()
        check_status(
            self._library.looptx_logits(self._handle, _at(state), _at(logits), *rows.arguments)
        )
        return logits

    def backfill(
        self, state: Tensor, embedding: Tensor, loops: Sequence[int], rows: KernelRows
    ) -> None:
        """Rows exit after their loops, with these states (rows, d_model): write what deeper, later
        rows will attend to."""
        check_status(
            self._library.looptx_backfill(
                self._handle, _at(state), _at(embedding), ints(loops), *rows.arguments
            )
        )

    def confidence(self, state: Tensor, loops: Sequence[int]) -> list[tuple[float, float]]:
        """The confidence head's log-odds and gain after each row's loop."""
        out = (ctypes.c_float * (2 * len(state)))()
        check_status(
            self._library.looptx_confidence(self._handle, _at(state), ints(loops), len(state), out)
        )
        return list(zip(out[::2], out[1::2]))

    def fold(
        self, cache: KernelCache, rows: Sequence[int], first: int, deepest: Sequence[int]
    ) -> None:
        """Take the block of these rows that begins at slot `first` of a ring into the memories.

        deepest: the most loops that each of the rows runs.
        """
        check_status(self._library.looptx_fold(
            self._handle, ints(rows), ints(deepest), len(rows), first, ctypes.byref(cache.struct)
        ))  # fmt: skip

    # What follows describes the model to the kernel.

    def _describe(self, model: LoopedTransformer) -> ModelWeights:
        config, injection, head = model.config, model.injection, model.confidence
        found = all_blocks(model)
        blocks = (BlockWeights * len(found))(*map(self._block, found))
        self._kept.append(blocks)
        parts: dict[str, Any] = {}
        if injection.kind == "bridge":
            parts |= {
                "state_norm": self._vector(injection.state_norm.weight),
                "bridge": self._layer(injection.bridge),
            }
        elif injection.kind == "norm":
            parts |= {
                "state_norm": self._vector(injection.state_norm.weight),
                "embedding_scale": self._vector(injection.embedding_scale),
            }
        elif injection.kind not in ("none", "half_steps"):
            ones = torch.ones(config.d_model)
            decays = injection.kind == "decay"
            parts |= {
                "state_norm": self._vector(injection.state_norm.weight),
                "embedding_norm": self._vector(injection.embedding_norm.weight),
                "state_scale": self._vector(torch.sigmoid(-injection.decay) if decays else ones),
                "embedding_scale": self._vector(injection.gain if decays else ones),
            }
        return ModelWeights(
            d_model=config.d_model, heads=config.n_heads, kv_heads=config.n_kv_heads,
            head_dim=config.head_dim, d_ff=config.d_ff, vocab=config.vocab_size,
            prelude=config.prelude_layers, core=config.core_layers, coda=config.coda_layers,
            max_loops=config.max_loops, silu=config.activation == "silu",
            injection=_INJECTIONS.get(injection.kind, BY_CHANNEL), memory=_memory(config),
            memory_window=config.memory_window, memory_block=config.memory_block,
            eps=config.norm_eps,
            blocks=ctypes.addressof(blocks), **parts,
            embedding=self._rows(model.embedding), norm=self._vector(model.norm.weight),
            frequencies=self._vector(
                rotary_frequencies(config.head_dim, config.rope_theta, config.scaled_rope)
            ),
            head=self._layer(model.head),
            confidence_hidden=self._matrix(head.hidden.weight, FLOAT),
            confidence_gate=self._matrix(head.gate.weight, FLOAT),
            confidence_norm=self._vector(head.norm.weight),
            confidence_bias=self._vector(head.hidden.bias),
            confidence_gate_bias=self._vector(head.gate.bias),
            confidence_loop=self._vector(head.loop.weight),
            confidence_out=self._vector(torch.cat([head.gain.weight, head.out.weight], 1)),
            confidence_out_bias=self._vector(torch.cat([head.out.bias, head.gain.bias])),
            gain_units=head.widths[0],
        )  # fmt: skip

    def _block(self, block: Block) -> BlockWeights:
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
        biases = {
            name: self._vector(bias)
            for name in ("q_bias", "k_bias", "v_bias")
            if (bias := getattr(attention, name)) is not None
        }
        memory = attention.memory.named_parameters() if attention.memory is not None else ()
        return BlockWeights(
            **biases,
            **{name: self._vector(values) for name, values in memory},
            **{name: self._layer(layer) for name, layer in named.items()},
            **{
                name: self._vector(norm.weight)
                for name, norm in norms.items()
                if isinstance(norm, RMSNorm)
            },
        )

    def _layer(self, layer: nn.Module) -> Matrix:
        if isinstance(layer, TernaryLinear):
            packed, scale = self._keep(_in_fours(layer.packed)), self._vector(layer.scale)
            return Matrix(packed, scale, layer.out_features, layer.in_features, TERNARY)
        if isinstance(layer, Int8Linear):
            codes, scale = self._keep(_in_fours(layer.weight)), self._vector(layer.weight_scale)
            return Matrix(codes, scale, layer.out_features, layer.in_features, BYTES)
        assert isinstance(layer, nn.Linear)
        return self._matrix(layer.weight, self._kind)

    def _rows(self, embedding: nn.Module) -> int:
        """A row of floats for each token, which the kernel reads one by one."""
        if isinstance(embedding, Int8Embedding):
            return self._vector(embedding.as_float())
        assert isinstance(embedding, nn.Embedding)
        return self._vector(embedding.weight)

    def _matrix(self, weight: Tensor, kind: int) -> Matrix:
        rows, width = weight.shape
        scales = None
        if kind == BFLOAT:
            weight = weight.bfloat16()
        elif kind == BFLOAT_TILES:
            weight = _in_tiles(weight.bfloat16())
        elif kind == BYTES:
            values, scale = int8_by_row(weight)
            weight, scales = _in_fours(values.to(torch.int8)), self._vector(scale)
        return Matrix(self._keep(weight), scales, rows, width, kind)

    def _vector(self, values: Tensor) -> int:
        return self._keep(values.float())

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _memory(config: ModelConfig) -> int:
    subtracts = config.memory == "infini" and config.infini_delta
    return INFINI_DELTA if subtracts else _MEMORIES[config.memory]


def _in_fours(values: Tensor) -> Tensor:
    """(rows, bytes), with rows of 0 up to a multiple of four."""
    missing = -len(values) % 4
    return nn.functional.pad(values, (0, 0, 0, missing)) if missing else values


def _in_tiles(weight: Tensor) -> Tensor:
    """(rows, width) as the tiles of amx.h, filled up with zeros to multiples of 32."""
    rows, width = weight.shape
    full = nn.functional.pad(weight, (0, -width % 32, 0, -rows % 32))
    halves = full.view(-(-rows // 32), 2, 16, -(-width // 32), 2, 16)
    return halves.permute(0, 3, 1, 5, 2, 4)  # 32 rows, step, half of the rows, pair, row, which


def _threads() -> int:
    return max(1, torch.get_num_threads())


def _at(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous(), "the kernel reads memory as it lies"
    return ctypes.c_void_p(tensor.data_ptr())
