"""Attention through one function with exchangeable back ends."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from looptx_core.errors import MissingError, UsageError
from looptx_core.model.fused import can_use_fused, causal_attention


@dataclass(frozen=True)
class VarlenBatch:
    """Documents that follow each other in a batch's rows, for back ends that need no mask.

    documents: (rows, length), numbers; a token attends to those of its own document, up to itself.
    starts: where documents start in rows laid end to end, int32, with the end of all; a row's start
    is one. length: of a row, the longest that a document can be.
    """

    documents: Tensor
    starts: Tensor
    length: int
    counts: tuple[int, ...]
    """How many documents stand in each row and those above it."""

    @staticmethod
    def of(documents: Tensor) -> VarlenBatch:
        """From the documents' numbers, (rows, length)."""
        new = torch.ones_like(documents, dtype=torch.bool)
        new[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts = F.pad(new.flatten().nonzero().flatten(), (0, 1), value=documents.numel())
        counts = tuple(new.sum(1).cumsum(0).tolist())
        return VarlenBatch(documents, starts.to(torch.int32), documents.shape[1], counts)

    @cached_property
    def first(self) -> Tensor:
        """The column of a row where the document of each token starts, (rows, length) int32."""
        flat = self.starts[:-1].to(torch.int64)
        marks = torch.zeros(self.documents.numel(), dtype=torch.int64, device=flat.device)
        marks[flat] = flat % self.documents.shape[1]
        return marks.view_as(self.documents).cummax(1).values.to(torch.int32)

    def __getitem__(self, rows: Tensor | slice) -> VarlenBatch:
        if isinstance(rows, slice) and not rows.start and rows.step is None and rows.stop:
            counts = self.counts[rows]  # the first rows: without a look at the device
            return VarlenBatch(
                self.documents[rows], self.starts[: counts[-1] + 1], self.length, counts
            )
        return VarlenBatch.of(self.documents[rows])

    def mask(self) -> Tensor:
        """The same as a mask, (rows, 1, length, length)."""
        return self._mask

    @cached_property
    def _mask(self) -> Tensor:  # once for all blocks and loops that ask
        return within_documents(self.documents)


def within_documents(documents: Tensor) -> Tensor:
    """A causal mask within each document, (rows, 1, length, length), of numbers (rows, length)."""
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()


Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | VarlenBatch | None"], Tensor]
"""(queries, keys, values, mask) -> output.

queries (batch, heads, new, head_dim); keys and values (batch, kv_heads, seen, head_dim);
mask (batch or 1, 1, new, seen), True where a query may attend, or None: causal if new > 1, no mask
if new == 1; or documents, for a back end with `takes_varlen`. The output has the queries' shape.
"""


def sdpa(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | VarlenBatch | None
) -> Tensor:
    """torch's fused attention, which runs everywhere; for training on a CPU, our own kernel."""
    if _slow_in_half(queries, keys, values):
        with torch.autocast("cpu", enabled=False):
            out = sdpa(queries.float(), keys.float(), values.float(), mask)
        return out.to(values.dtype)
    if _trains(queries, keys, values) and (isinstance(mask, VarlenBatch) or mask is None):
        return causal_attention(queries, keys, values, None if mask is None else mask.first)
    mask = mask.mask() if isinstance(mask, VarlenBatch) else mask
    batch, heads, new, width = queries.shape
    if new == 1 and keys.shape[1] != heads:
        # The query heads that share a key head are treated as positions of a sequence.
        grouped = queries.view(batch, keys.shape[1], -1, width)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return out.reshape(batch, heads, 1, width)
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None and queries.shape[2] > 1,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )


def _slow_in_half(*inputs: Tensor) -> bool:
    """Whether a backward pass will follow in bf16 on a CPU, which costs torch's attention six times
    what it does in float32."""
    return (
        inputs[0].device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in inputs)
    )


def _trains(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether our kernel can run and keeps all threads busy, which share rows and key heads."""
    return (
        can_use_fused(queries, keys, values, operation="attention")
        and queries.dtype == keys.dtype == values.dtype == torch.float32
        and queries.shape[2] == keys.shape[2] > 1
        and keys.shape[0] * keys.shape[1] >= torch.get_num_threads()
    )


def takes_documents(attend: Attend, like: Tensor) -> bool:
    """Whether a back end is faster with a `VarlenBatch` than with its mask.

    like: a tensor of the type and device that attention will get.
    """
    return getattr(attend, "takes_varlen", False) or (
        attend is sdpa and can_use_fused(like, operation="attention")
    )


# (queries, keys, values, starts, length) -> output, all (tokens, heads, head_dim): causal within
# each document, with grouped heads.
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


class Flash:
    """FlashAttention (arXiv 2307.08691) over packed documents, without padding and without a mask.

    Plain causal attention goes to SDPA, which runs the same kernels; so do masks and float32.
    """

    takes_varlen = True

    def __init__(self, varlen: Varlen) -> None:
        self.varlen = varlen

    def __call__(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | VarlenBatch | None
    ) -> Tensor:
        if not isinstance(mask, VarlenBatch) or values.dtype not in _HALVES:
            return sdpa(queries, keys, values, mask)
        rows, _, length, _ = queries.shape
        # Under autocast a norm leaves queries and keys in float32.
        q, k, v = (
            x.to(values.dtype).transpose(1, 2).flatten(0, 1) for x in (queries, keys, values)
        )
        out = self.varlen(q, k, v, mask.starts, mask.length)
        return out.unflatten(0, (rows, length)).transpose(1, 2)


_HALVES = (torch.float16, torch.bfloat16)


def _by_torch() -> Varlen:
    """torch's own kernels: FlashAttention 2, or whichever was activated."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters  # which versions of torch name as they like
    ways = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    causal: dict[str, Any] = ways | ({"enable_gqa": True} if "enable_gqa" in known else {})

    def call(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, length: int) -> Tensor:
        out = varlen_attn(q, k, v, starts, starts, length, length, **causal)
        assert isinstance(out, Tensor)
        return out

    return call


def _activated(name: str) -> Varlen:
    """torch's, after FlashAttention 3 or 4 took the place of its kernels."""
    from torch.nn.attention import activate_flash_attention_impl

    activate_flash_attention_impl(name)
    return _by_torch()


def _by_package() -> Varlen:
    """The package flash-attn."""
    from flash_attn import flash_attn_varlen_func

    def call(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, length: int) -> Tensor:
        return flash_attn_varlen_func(q, k, v, starts, starts, length, length, causal=True)

    return call


@dataclass(frozen=True)
class FlashKind:
    """A version of FlashAttention: the module it needs and the GPUs it runs on."""

    name: str
    module: str
    majors: range
    """Of the compute capability."""
    make: Callable[[], Varlen]


FLASH_KINDS = (
    FlashKind("FA4", "flash_attn.cute.interface", range(9, 11), lambda: _activated("FA4")),
    FlashKind("FA3", "flash_attn_interface", range(9, 10), lambda: _activated("FA3")),
    FlashKind("FA2 of flash-attn", "flash_attn", range(8, 99), _by_package),
    FlashKind("FA2 of torch", "torch.nn.attention.varlen", range(8, 99), _by_torch),
)
"""The newest first."""


def attention_weights(queries: Tensor, keys: Tensor, mask: Tensor | VarlenBatch | None) -> Tensor:
    """The attention's probabilities, (batch, heads, new, seen), by the explicit formula."""
    mask = mask.mask() if isinstance(mask, VarlenBatch) else mask
    _, heads, new, width = queries.shape
    keys = keys.repeat_interleave(heads // keys.shape[1], dim=1)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(width)
    if mask is None and new > 1:
        mask = torch.ones(new, keys.shape[2], dtype=torch.bool, device=keys.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1)


def explicit(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | VarlenBatch | None
) -> Tensor:
    """Attention by its defining formula, the reference for the other back ends."""
    return _weighed(attention_weights(queries, keys, mask), values)


def _weighed(weights: Tensor, values: Tensor) -> Tensor:
    return weights @ values.repeat_interleave(weights.shape[1] // values.shape[1], dim=1)


class Recording:
    """An explicit back end that keeps the weights of every call, in the order of the calls.

    `weights` is a list of (batch, heads, new, seen): prelude blocks, then the core's blocks
    once per loop, then the coda's. Where gradients are on, they reach these very tensors.
    """

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | VarlenBatch | None
    ) -> Tensor:
        weights = attention_weights(q, k, mask)
        if torch.is_grad_enabled() and not weights.requires_grad:  # the layers before are frozen
            weights.requires_grad_()
        self.weights.append(weights)
        return _weighed(weights, v)


@dataclass(frozen=True)
class Backend:
    """A back end and the one-line reason for its choice."""

    name: str
    attend: Attend
    reason: str


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """Resolve `auto`, `sdpa`, `flash` or `explicit` for a device and a type.

    Raises `MissingError` where `flash` is asked for by name and can't run.
    """
    if name == "sdpa":
        return Backend("sdpa", sdpa, "asked for")
    if name == "explicit":
        return Backend("explicit", explicit, "asked for")
    if name not in ("auto", "flash"):
        raise UsageError(f"`attention` {name}: not one of auto, sdpa, flash, explicit")
    obstacle = _why_no_flash(device, dtype)
    if obstacle is None:
        chosen = choose_flash(torch.cuda.get_device_capability(device)[0], device, dtype)
        if isinstance(chosen, Backend):
            return chosen
        obstacle = chosen
    if name == "flash":
        raise MissingError(f"`attention` flash: {obstacle}")
    return Backend("sdpa", sdpa, f"no flash-attn: {obstacle}")


def choose_flash(
    major: int,
    device: torch.device,
    dtype: torch.dtype,
    kinds: Sequence[FlashKind] = FLASH_KINDS,
) -> Backend | str:
    """The newest version that is here and passes a trial, or one line on why there is none.

    major: of the GPU's compute capability.
    """
    why = []
    for kind in kinds:
        if major not in kind.majors:
            why.append(f"{kind.name} does not run on compute capability {major}")
        elif not _is_here(kind.module):
            why.append(f"{kind.name} needs {kind.module}")
        else:
            try:
                attend = Flash(kind.make())
                error = trial_error(attend, device, dtype)
            except Exception as problem:  # a prototype may fail in any way; the next is tried
                why.append(f"{kind.name} failed ({type(problem).__name__}: {problem})")
                _deactivate()
                continue
            if error < _TRIAL_LIMIT:
                passed = "; ".join([f"{kind.name} runs in {dtype}, documents packed", *why])
                return Backend("flash", attend, passed)
            why.append(f"{kind.name} is off by {error:.2g} in a trial")
            _deactivate()
    return "; ".join(why) + "; pip install 'looptx[flash]' --no-build-isolation"


_TRIAL_LIMIT = 0.03  # relative; bf16 itself is good to 0.004 a number


def trial_error(attend: Attend, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error, in norm, of a back end's outputs and gradients on packed
    documents."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.tensor([[0] * 5 + [1] * 11, [2] * 9 + [3] * 7], device=device)
    shapes = ((2, 4, 16, 64), (2, 2, 16, 64), (2, 2, 16, 64))
    plain = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    found = []
    for function, kind in ((attend, dtype), (explicit, torch.float32)):
        inputs = [x.detach().to(kind).requires_grad_() for x in plain]
        packed = VarlenBatch.of(documents)
        mask = packed if function is attend else packed.mask()
        out = function(inputs[0], inputs[1], inputs[2], mask)
        gradients = torch.autograd.grad(out.float().square().sum(), inputs)
        found.append([x.detach().float() for x in (out, *gradients)])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found))


def _deactivate() -> None:
    """Restore torch's own kernels."""
    import torch.nn.attention as kernels

    if getattr(kernels, "current_flash_attention_impl", lambda: None)() is not None:
        kernels.restore_flash_attention_impl()


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent of it is missing
        return False


def _why_no_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA GPU and the model is on {device.type}"
    if dtype not in _HALVES:
        return f"it needs bfloat16 or float16, not {dtype}; pass `precision` bf16"
    return None


def with_groups(mask: Tensor | None, groups: Tensor) -> Tensor:
    """The mask, extended so that tokens of the same group, (batch, length), see each other.

    A mask over a cache has columns of earlier tokens before those of these.
    """
    same = (groups[:, :, None] == groups[:, None, :]) & (groups >= 0)[:, None, :]
    length = groups.shape[1]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=groups.device).tril()
    return mask | F.pad(same, (mask.shape[-1] - length, 0))[:, None]
