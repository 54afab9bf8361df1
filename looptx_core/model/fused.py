"""Fused CPU kernels for what a training step does between its matrix products.

`fused.cpp` has the forward and backward of RMSNorm, of RoPE with a norm before it or without, of
GeGLU's and SwiGLU's gates, of causal attention and of the cross-entropy; `products.py` joins matrix
products. Modules use them when they are enabled (`enable_fused`), gradients are on, and the inputs
are CPU tensors of float32 or, under autocast in it, of bfloat16 (`can_use_fused`). All compute in
float32, and attention takes nothing else. A gradient of a gradient is refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from looptx_core.errors import MissingError
from looptx_core.machine.kernels import load

SOURCE = Path(__file__).with_suffix(".cpp")
OPERATIONS = ("norm", "norm and RoPE", "gate", "products", "attention", "loss")

_library: ctypes.CDLL | None = None
_taken: frozenset[str] = frozenset()


def enable_fused(on: bool | Collection[str] = True) -> str:
    """Turn the kernels on or off; returns a line on which are on and why.

    on: True for all of `OPERATIONS`, False for none, or the names of some.
    """
    global _library, _taken
    _library, _taken = None, frozenset(OPERATIONS if on is True else on or ())
    if on is False:
        return "plain torch, as the kernels are for what is not compiled"
    try:
        _library = load(SOURCE)
    except MissingError as error:
        return f"plain torch: {error}"
    return "fused, norms, RoPE, gates, attention and the loss in one pass each"


def is_prepared() -> bool:
    """Whether the kernels are loaded."""
    return _library is not None


def can_use_fused(*tensors: Tensor, operation: str | None = None) -> bool:
    """Whether a kernel can run on these tensors: of one of `OPERATIONS`, by default of any."""
    if (
        _library is None
        or not (operation in _taken if operation else _taken)
        or not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
    ):
        return False
    taken = {torch.float32, product_type()}
    return taken <= {torch.float32, torch.bfloat16} and all(
        type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.dtype in taken
        for x in tensors
    )


def product_type() -> torch.dtype:
    """What matrix products on a CPU are computed in: autocast's type, or float32."""
    automatic = torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if automatic else torch.float32


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel with torch's number of threads, and its arguments as C types."""
    plain: list[Any] = [ctypes.c_int(torch.get_num_threads())]
    for value in arguments:
        if value is None:
            plain.append(ctypes.c_void_p())
        elif isinstance(value, Tensor):
            plain.append(ctypes.c_void_p(value.data_ptr()))
        elif isinstance(value, int):
            plain.append(ctypes.c_int64(value))
        else:
            plain.append(ctypes.c_float(value))
    getattr(_library, name)(*plain)


def _half(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight, width = x.contiguous(), weight.float(), x.shape[-1]
        y, inverse = torch.empty_like(x), weight.new_empty(x.numel() // width)
        _call("looptx_norm", _half(x), len(inverse), width, eps, x, weight, y, inverse)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        dx, dy = torch.empty_like(x), dy.contiguous()
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        sizes = _half(x), len(inverse), len(weight)
        _call("looptx_norm_backward", *sizes, dy, x, weight, inverse, dx, dweight)
        return dx, dweight, None


class _Turn(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float
    ) -> Tensor:
        x, cos, sin = x.contiguous(), cos.float().contiguous(), sin.float().contiguous()
        weight = None if weight is None else weight.float()
        batch, length, heads, width = x.shape
        y = torch.empty_like(x, dtype=torch.float32)
        inverse = None if weight is None else y.new_empty(batch * length * heads)
        ctx.sizes = batch * length, heads, width, cos.numel() // width
        ctx.half = _half(x)
        _call("looptx_turn", ctx.half, *ctx.sizes, eps, x, weight, cos, sin, y, inverse)
        ctx.save_for_backward(None if weight is None else x, weight, cos, sin, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight, *tables = ctx.saved_tensors
        dy = dy.contiguous()
        dx = torch.empty_like(dy, dtype=torch.bfloat16 if ctx.half else torch.float32)
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        _call("looptx_turn_backward", ctx.half, *ctx.sizes, dy, x, weight, *tables, dx, dweight)
        return dx, dweight, None, None, None


class _Gate(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, silu: bool) -> Tensor:
        kind = torch.promote_types(gate.dtype, up.dtype)  # the kernel takes one
        gate, up = gate.to(kind).contiguous(), up.to(kind).contiguous()
        y = torch.empty_like(gate)
        _call("looptx_gate", _half(gate), silu, gate.numel(), gate, up, y)
        ctx.save_for_backward(gate, up)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dgate, dup, dy = torch.empty_like(gate), torch.empty_like(up), dy.contiguous()
        sizes = _half(gate), ctx.silu, gate.numel()
        _call("looptx_gate_backward", *sizes, dy, gate, up, dgate, dup)
        return dgate, dup, None


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, targets = logits.contiguous(), targets.contiguous()
        losses, hits, tops, sums = torch.empty(4, len(logits)).unbind()
        sizes = _half(logits), *logits.shape
        _call("looptx_cross_entropy", *sizes, logits, targets, losses, hits, tops, sums)
        ctx.save_for_backward(logits, targets, sums)
        ctx.mark_non_differentiable(hits, tops)
        return losses, hits, tops

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        logits, targets, sums = ctx.saved_tensors
        dlogits, dlosses = torch.empty_like(logits), dlosses.contiguous()
        sizes = _half(logits), *logits.shape
        _call("looptx_cross_entropy_backward", *sizes, dlosses, logits, targets, sums, dlogits)
        return dlogits, None


class _Heads(ctypes.Structure):
    """A tensor (batch, heads, length, head_dim) in any layout whose last stride is 1."""

    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3)]

    @classmethod
    def array(cls, *tensors: Tensor) -> Any:
        """An array of descriptions, for a call."""
        each = (cls(x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride()[:3])) for x in tensors)
        return (cls * len(tensors))(*each)


class _Attend(Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, first: Tensor | None
    ) -> Tensor:
        q, k, v = map(_rows_whole, (queries, keys, values))
        batch, heads, length, width = q.shape
        if first is None:
            first = torch.zeros(batch, length, dtype=torch.int32)
        # The layout in which heads are joined without a copy; the gradients below have it too.
        out = q.new_empty(batch, length, heads, width).transpose(1, 2)
        sums = q.new_empty(batch, heads, length)
        ctx.sizes = batch, k.shape[1], heads // k.shape[1], length, width, width**-0.5
        tensors = _Heads.array(q, k, v, out)
        _call("looptx_attend", *ctx.sizes, first, ctypes.addressof(tensors), sums)
        ctx.save_for_backward(q, k, v, out, sums, first)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, sums, first = ctx.saved_tensors
        dout = _rows_whole(dout)
        dq, dk, dv = (
            x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
            for x in (q, k, v)
        )
        tensors = _Heads.array(q, k, v, out, dout, dq, dk, dv)
        _call("looptx_attend_backward", *ctx.sizes, first, ctypes.addressof(tensors), sums)
        return dq, dk, dv, None


def _rows_whole(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`RMSNorm` over the last dimension, in x's type."""
    return _Norm.apply(x, weight, eps)


def norm_and_rotate(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor
) -> Tensor:
    """`rotate` of `RMSNorm`, or of x where the weight is None; (batch, length, heads, head_dim).

    The result is of float32.
    """
    return _Turn.apply(x, weight, cos, sin, eps)


def gated(gate: Tensor, up: Tensor, silu: bool = False) -> Tensor:
    """gelu(gate) * up, the gelu by the error function, or silu(gate) * up, in the wider
    of their types."""
    return _Gate.apply(gate, up, silu)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss in nats, 1 if the target has the largest logit else 0, probability of the top class).

    logits (tokens, classes), targets (tokens,) of int64; all results (tokens,) of float32. The loss
    of a target outside the classes is NaN.
    """
    return _CrossEntropy.apply(logits, targets)


def causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, first: Tensor | None = None
) -> Tensor:
    """Causal attention with grouped heads, in blocks that are not stored (arXiv 2205.14135).

    queries (batch, heads, length, head_dim), keys and values (batch, kv_heads, length, head_dim);
    first: the first column that each query sees, (batch, length) int32, at most its own and not
    decreasing along a row; None: column 0. The result has the queries' shape.
    """
    return _Attend.apply(queries, keys, values, first)
