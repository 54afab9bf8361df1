"""Which fused kernels a run on a CPU takes: those that a short trial finds faster than plain torch.

Which ones win depends on the processor, the number of threads and the shapes. A trial's result is
kept in the user's cache, so that all runs of one shape on one machine choose alike, and in the
run's folder, so that a resumed run goes on with the same arithmetic.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from looptx_core.atomic import write_file
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import RunConfig
from looptx_core.documents import read_json, some, to_json
from looptx_core.errors import DataError, LooptxError, UsageError
from looptx_core.machine.kernels import library_path
from looptx_core.model import fused
from looptx_core.model.attention import VarlenBatch, sdpa
from looptx_core.model.block import Block
from looptx_core.model.products import Product, multi_linear
from looptx_core.model.rope import rotary_tables
from looptx_core.model.score import score
from looptx_core.schema import typed

SCHEMA_VERSION = 1
FILE = "kernels.json"
VARIABLE = "LOOPTX_KERNELS"
"""`all` takes every kernel untried, so that machines and versions can be compared bit for bit."""
_TOKENS = 4096  # at most, of a trial's step
_ROUNDS = 5
_RANK = 8  # of the adapters whose products it times
_MEND = "remove it, and the run takes all kernels and may differ in the last bits"


@dataclass(frozen=True)
class KernelChoice:
    """The operations that are fused, and what the trial measured: milliseconds of a forward and
    backward pass, plain and fused, the best of some rounds."""

    taken: tuple[str, ...]
    milliseconds: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        plain = [name for name in fused.OPERATIONS if name not in self.taken]
        words = [f"fused: {', '.join(self.taken)}"] * bool(self.taken)
        words += [f"plain torch, which is faster here: {', '.join(plain)}"] * bool(plain)
        return "; ".join(words)


def enable_kernels(
    model: ModelConfig,
    config: RunConfig,
    folder: Path,
    wanted: bool = True,
    resume: bool = False,
    precision: str = "float32",
) -> str:
    """Turn on the kernels for a run of this model, in the shapes of its micro-batches.

    folder: of the run, which records the choice. wanted: else all are off. resume: take the
    recorded choice. precision: bf16, by autocast, or float32. Returns a line on what was chosen and
    why. Raises `DataError` for a record that cannot be used, `LooptxError` where it cannot be
    written, `UsageError` for a value of $LOOPTX_KERNELS that is unknown.
    """
    said = fused.enable_fused(wanted)
    if not fused.is_prepared():
        return said
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    file = folder / (f"kernels-{rank}.json" if rank else FILE)
    asked = os.environ.get(VARIABLE, "try")
    if asked not in ("try", "all"):
        raise UsageError(f"{VARIABLE} is {asked!r}, not 'try' or 'all'")
    if resume:
        # A run from before such records took all kernels, and none in bf16.
        before = fused.OPERATIONS if precision == "float32" else ()
        choice = _read(file) if file.exists() else KernelChoice(before, {})
    elif asked == "all":
        choice = KernelChoice(fused.OPERATIONS, {})
    else:
        choice = choose(model, config.micro_batch_size, config.seq_len, precision)
    _write(file, choice)
    fused.enable_fused(choice.taken)
    return str(choice)


def choose(
    config: ModelConfig, rows: int, length: int, precision: str = "float32", again: bool = False
) -> KernelChoice:
    """The kernels that win on this machine for these shapes; the trial takes a few seconds.

    precision: as for `enable_kernels`. again: measure even where an earlier trial is in the user's
    cache.
    """
    kernels = library_path(fused.SOURCE)
    shapes = config.to_dict(), rows, length, torch.get_num_threads(), torch.__version__, precision
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]
    cached = kernels.with_name(f"{kernels.stem}-{digest}.json")
    if not again:
        with contextlib.suppress(DataError):
            return _read(cached)
    found = measure(config, rows, length, precision)
    choice = KernelChoice(tuple(name for name, (plain, own) in found.items() if own < plain), found)
    with contextlib.suppress(LooptxError):  # the cache only spares the next trial
        _write(cached, choice)
    return choice


def measure(
    config: ModelConfig, rows: int, length: int, precision: str = "float32"
) -> dict[str, tuple[float, float]]:
    """Milliseconds of each operation's forward and backward pass, plain and fused.

    The fused kernels must be prepared; all of them are on afterwards.
    """
    rows = max(1, min(rows, _TOKENS // length))
    halves = precision == "bf16"
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=halves),
    ):
        torch.manual_seed(0)
        steps = _steps(config, rows, length, torch.bfloat16 if halves else torch.float32)
        found = {}
        for name, step in steps.items():
            best = {(): float("inf"), (name,): float("inf")}
            for number in range(_ROUNDS + 1):
                for taken in best:
                    fused.enable_fused(taken)
                    started = time.perf_counter()
                    step()
                    if number:  # the first round warms up
                        best[taken] = min(best[taken], time.perf_counter() - started)
            plain, own = (round(1e3 * seconds, 4) for seconds in best.values())
            found[name] = (plain, own)
    fused.enable_fused()
    return found


def _steps(
    config: ModelConfig, rows: int, length: int, kind: torch.dtype
) -> dict[str, Callable[[], object]]:
    """A forward and backward pass of each operation, by the modules that use it.

    kind: of what stands beside products, such as heads and logits.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    def beside(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=kind, requires_grad=True)

    block = Block(config)
    width, heads, kv = config.head_dim, config.n_heads, config.n_kv_heads
    x, inner = normal(rows, length, config.d_model), beside(rows, length, config.d_ff)
    up, parts = beside(rows, length, config.d_ff), beside(rows, length, heads, width)
    queries, keys = (normal(rows, n, length, width) for n in (heads, kv))
    values = beside(rows, kv, length, width)
    rotary = rotary_tables(torch.arange(length)[None, None], width, config.rope_theta, x.dtype)
    documents = VarlenBatch.of((torch.arange(length) * 2 // length).expand(rows, -1))
    logits = beside(rows * length, config.vocab_size)
    targets = torch.randint(0, config.vocab_size, (rows * length,))
    mask = documents.mask()  # made once for all blocks and loops
    frozen = [torch.randn(config.d_ff, config.d_model, dtype=kind) for _ in range(2)]
    downs = [normal(_RANK, config.d_model) for _ in frozen]
    ups = [normal(config.d_ff, _RANK) for _ in frozen]

    def products() -> Tensor:
        if kind == torch.float32:
            return torch.cat([part.flatten() for part in block.mlp.project(x)])
        # In bf16 they are taken for frozen weights alone, beside which adapters train.
        each = list(zip(frozen, downs, ups))
        if fused.can_use_fused(x, operation="products"):
            return torch.cat(multi_linear(x, [Product(*one) for one in each]), -1)
        return torch.cat([F.linear(x, w) + F.linear(F.linear(x, a), b) for w, a, b in each], -1)

    def attend() -> Tensor:
        packed = fused.can_use_fused(queries, operation="attention")
        return sdpa(queries, keys, values, documents if packed else mask)

    def gate() -> Tensor:
        silu = config.activation == "silu"
        if fused.can_use_fused(inner, up, operation="gate"):
            return fused.gated(inner, up, silu)
        return (F.silu if silu else F.gelu)(inner) * up

    forward: dict[str, Callable[[], Tensor]] = {
        "norm": lambda: block.mlp_norm(x),
        "products": products,
        "attention": attend,
        "loss": lambda: score(logits, targets).loss,
    }
    if config.activation in ("gelu", "silu"):
        forward["gate"] = gate
    if not config.qk_norm or config.qk_norm_over == "head":
        forward["norm and RoPE"] = lambda: block.attention.q_norm(parts, rotary)
    found = {name: forward[name] for name in fused.OPERATIONS if name in forward}
    return {name: lambda f=function: f().sum().backward() for name, function in found.items()}  # type: ignore[misc]


def _write(file: Path, choice: KernelChoice) -> None:
    document = {"schema_version": SCHEMA_VERSION, **asdict(choice)}
    write_file(file, to_json(document), parents=True)


def _read(file: Path) -> KernelChoice:
    document = read_json(file, mend=_MEND)
    if document.pop("schema_version", None) != SCHEMA_VERSION:
        raise DataError(f"{file}: of another format; {_MEND}")
    choice = typed(KernelChoice, document, str(file), mend=_MEND)
    if unknown := {*choice.taken} - {*fused.OPERATIONS}:
        raise DataError(f"{file}: no kernel is named {some(sorted(unknown))}; {_MEND}")
    return choice
