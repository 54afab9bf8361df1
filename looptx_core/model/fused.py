"""Fused CPU kernels for what a training step does between its matrix products.

`fused.cpp` has the forward and backward of RMSNorm, of RMSNorm with RoPE, of GeGLU's gate, of
causal attention and of the cross-entropy; `multi_linear` accumulates the gradient of the input
inside the matmuls. Modules use these kernels when they are enabled (`enable_fused`) and the inputs
are float32 CPU tensors that need gradients (`can_use_fused`). A gradient of a gradient is refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
        return "plain torch, as the kernels are for float32 that is not compiled"
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
    return (
        _library is not None
        and (operation in _taken if operation else bool(_taken))
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and all(
            type(x) in (Tensor, torch.nn.Parameter)
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            for x in tensors
        )
    )


def _call(name: str, *arguments: Tensor | int | float) -> None:
    """Call a kernel with torch's number of threads, and its arguments as C types."""
    plain: list[Any] = [ctypes.c_int(torch.get_num_threads())]
    for value in arguments:
        if isinstance(value, Tensor):
            plain.append(ctypes.c_void_p(value.data_ptr()))
        elif isinstance(value, int):
            plain.append(ctypes.c_int64(value))
        else:
            plain.append(ctypes.c_float(value))
    getattr(_library, name)(*plain)


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, width = x.contiguous(), x.shape[-1]
        y, inverse = torch.empty_like(x), x.new_empty(x.numel() // width)
        _call("looptx_norm", len(inverse), width, eps, x, weight, y, inverse)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        dx, dweight, dy = torch.empty_like(x), torch.empty_like(weight), dy.contiguous()
        sizes = len(inverse), len(weight)
        _call("looptx_norm_backward", *sizes, dy, x, weight, inverse, dx, dweight)
        return dx, dweight, None


class _Turn(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
    ) -> Tensor:
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        batch, length, heads, width = x.shape
        y, inverse = torch.empty_like(x), x.new_empty(batch * length * heads)
        ctx.sizes = batch * length, heads, width, cos.numel() // width
        _call("looptx_turn", *ctx.sizes, eps, x, weight, cos, sin, y, inverse)
        ctx.save_for_backward(x, weight, cos, sin, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, *tables = ctx.saved_tensors
        dx, dweight, dy = torch.empty_like(x), torch.empty_like(weight), dy.contiguous()
        _call("looptx_turn_backward", *ctx.sizes, dy, x, weight, *tables, dx, dweight)
        return dx, dweight, None, None, None


class _GeluGate(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        _call("looptx_gelu_gate", gate.numel(), gate, up, y)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup, dy = torch.empty_like(gate), torch.empty_like(up), dy.contiguous()
        _call("looptx_gelu_gate_backward", gate.numel(), dy, gate, up, dgate, dup)
        return dgate, dup


class _Products(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        wants_x, *wants = ctx.needs_input_grad
        nothing = [None] * len(weights)
        ctx.save_for_backward(x if any(wants) else None, *(weights if wants_x else nothing))
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        wants_x, *wants = ctx.needs_input_grad
        flat = [dy.flatten(0, -2) for dy in dys]
        dx = None
        if wants_x:
            dx = torch.mm(flat[0], weights[0])
            for dy, weight in zip(flat[1:], weights[1:]):
                dx.addmm_(dy, weight)
            dx = dx.view(*dys[0].shape[:-1], -1)
        dweights = (dy.T @ x.flatten(0, -2) if wanted else None for dy, wanted in zip(flat, wants))
        return dx, *dweights


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, targets = logits.contiguous(), targets.contiguous()
        losses, hits, tops, sums = (logits.new_empty(len(logits)) for _ in range(4))
        _call("looptx_cross_entropy", *logits.shape, logits, targets, losses, hits, tops, sums)
        ctx.save_for_backward(logits, targets, sums)
        ctx.mark_non_differentiable(hits, tops)
        return losses, hits, tops

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        logits, targets, sums = ctx.saved_tensors
        dlogits, dlosses = torch.empty_like(logits), dlosses.contiguous()
        sizes = logits.shape
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
    """`RMSNorm` over the last dimension."""
    return _Norm.apply(x, weight, eps)


def norm_and_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` of `RMSNorm`, x: (batch, length, heads, head_dim)."""
    return _Turn.apply(x, weight, cos, sin, eps)


def gelu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, the gelu by the error function."""
    return _GeluGate.apply(gate, up)


def multi_linear(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x (..., d_in) by each weight (d_out, d_in), as by linear layers: (..., d_out) each.

    The gradient of x is accumulated inside the matrix products, not by autograd after them.
    """
    return _Products.apply(x, *weights)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss in nats, 1 if the target has the largest logit else 0, probability of the top class).

    logits (tokens, classes), targets (tokens,) of int64; all results (tokens,). The loss of a
    target outside the classes is NaN.
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
