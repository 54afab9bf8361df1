"""The compiled kernel decodes models with a memory: rings, reading and folding as by torch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from picture_cases import CONFIG as PICTURES
from picture_cases import build, row
from test_cpu_kernel import SMALL, make
from test_memory import GREEDY, SETTINGS, TEXT, text_tokenizer

from looptx_core.backends import cuda_graphs
from looptx_core.backends.base import Backend
from looptx_core.backends.cpu.backend import CpuBackend, CpuPass
from looptx_core.backends.cpu.bindings import KernelModel
from looptx_core.backends.cpu.rounding import round_weights
from looptx_core.backends.cpu.structs import KernelCache, KernelRows
from looptx_core.backends.torch_backend import TorchBackend
from looptx_core.config.model import ModelConfig
from looptx_core.conversion.ternary import pack_model
from looptx_core.errors import UsageError
from looptx_core.generation.engine import Engine
from looptx_core.media.batch import MediaBatch
from looptx_core.model.cache import LoopCache
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.storage import to_int8

DELTA = replace(SMALL, memory="delta", memory_window=8, memory_block=4)
KINDS = {
    "delta": {},
    "delta by loop": {"memory_per_loop": True},
    "window of one block": {"memory_window": 4},
    "infini": {"memory": "infini"},
    "infini with delta": {"memory": "infini", "infini_delta": True},
}


def remembering(config: ModelConfig, seed: int = 0) -> LoopedTransformer:
    """A model whose tokens write, keep and read each as much as they like."""
    model = make(config, seed)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("write_bias"):
                values[1] = torch.randn(len(values[1]))
    return model


@torch.inference_mode()
def decoded(backend: Backend, policy: str = "fill", before: int = 0) -> dict[str, torch.Tensor]:
    """What three rows of lengths and depths of their own give, over three folds and more, with the
    rows in another order half way. before: the position of the first token."""
    model = backend.model
    cache = model.new_cache(3, 64, 5, policy)
    cache.shift -= before
    cache.shifted = before > 0
    ids = torch.randint(0, model.config.vocab_size, (3, 40), generator=torch.manual_seed(1))
    for own, length in enumerate((3, 7, 5)):
        for run, part in backend.prompt(cache, [own], ids[own : own + 1, :length]):
            embedding = run.embed(part)
            run.logits(run.iterate(embedding, embedding, [1], 5))
            cache.view(part.shape[1], [own]).advance()
    logits = []
    for step in range(16):
        if step == 7:
            cache.select_rows(torch.tensor([2, 0, 1]))
        rows, loops = [[2, 0, 1], [0, 1, 2]][step % 2], [1 + step % 3, 3, 2]
        run = backend.begin(cache, rows)
        start = run.embed(ids[rows, 8 + step, None])
        state = run.iterate(start, start, loops)
        logits.append(run.logits(state))
        run.backfill(state, start, loops)
        cache.advance(rows)
    assert max(cache.lengths) - model.config.memory_window >= 3 * model.config.memory_block
    memories = [layer.memory for layer in cache.core]
    return {
        "logits": torch.stack(logits),
        "matrix": torch.stack([memory.matrix for memory in memories]),
        "norm": torch.stack([memory.norm for memory in memories]),
        "document": torch.stack([memory.document for memory in memories]),
        "positions": cache.positions,
    }


def gaps(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[float]:
    """The largest differences, relative to the largest value."""
    assert not found["document"].any(), "every row has folded"
    assert torch.equal(found["positions"], wanted["positions"])
    return [
        float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max())
        for name in ("logits", "matrix", "norm") if wanted[name].numel()
    ]  # fmt: skip


LAST = [(kind, "last") for kind in ("delta", "infini")]


@pytest.mark.parametrize(("kind", "policy"), [*((kind, "fill") for kind in KINDS), *LAST])
def test_rings_reads_and_folds_are_torchs(kind: str, policy: str) -> None:
    model = remembering(replace(DELTA, **KINDS[kind]))
    found, wanted = (decoded(way(model), policy) for way in (CpuBackend, TorchBackend))
    assert max(gaps(found, wanted)) < 1e-4


@pytest.mark.parametrize("kind", ["delta", "infini"])
def test_what_is_read_matters(kind: str) -> None:
    """Else the test above would say little of the memory."""
    model = remembering(replace(DELTA, **KINDS[kind]))
    wanted = decoded(CpuBackend(model))
    with torch.no_grad():
        for block in model.core:
            block.attention.memory.gate_bias.fill_(-30)
            if model.config.memory == "delta":
                block.attention.memory.gate_weight.zero_()
    assert gaps(decoded(CpuBackend(model)), wanted)[0] > 1e-3


def test_positions_that_float32_does_not_tell_apart() -> None:
    model = remembering(DELTA)
    found, wanted = (decoded(way(model), before=2**25 + 1) for way in (CpuBackend, TorchBackend))
    assert max(gaps(found, wanted)) < 1e-4


@pytest.mark.parametrize("held", ["bf16", "int8", "stored int8", "ternary"])
def test_weights_of_all_types_remember(held: str) -> None:
    """The memory's own parameters stay float32, and so does what it reads and writes."""
    if held == "ternary":
        model = pack_model(remembering(replace(DELTA, linear="ternary"), seed=2))
    else:
        model = remembering(replace(DELTA, tie_embeddings=False))
    if held == "stored int8":
        model = to_int8(model)
    precision = held if held in ("bf16", "int8") else "float32"
    round_weights(model, precision)
    found, wanted = decoded(CpuBackend(model, precision)), decoded(TorchBackend(model))
    assert max(gaps(found, wanted)) < {"bf16": 1e-4, "ternary": 5e-2}.get(held, 5e-3)


@pytest.mark.parametrize(("kind", "policy"), [("delta", "fill"), ("infini with delta", "last")])
def test_the_engine_says_the_same_by_both(kind: str, policy: str) -> None:
    tokenizer = text_tokenizer()
    """Prompts of different lengths with early exits, on two rows that are used again."""
    config = replace(DELTA, vocab_size=tokenizer.get_vocab_size(), max_loops=3, **KINDS[kind])
    model, prompts = remembering(config), [TEXT[:n] for n in (4, 31, 60)]
    with torch.no_grad():
        model.confidence.out.bias.zero_()
        model.confidence.out.weight.mul_(3)
    options = replace(GREEDY, exit="confidence", kv_policy=policy, max_new_tokens=12)
    said = []
    for kernel in ("native", "torch"):
        engine = Engine(model, tokenizer, SETTINGS, batch_size=2, kernel=kernel)
        assert engine.kernel.startswith(kernel)
        said.append(engine.complete(prompts, options))
    assert len({step.loops for one in said[1] for step in one.tokens}) >= 2, "the case is too easy"
    for ours, theirs in zip(*said):
        assert [(s.id, s.loops) for s in ours.tokens] == [(s.id, s.loops) for s in theirs.tokens]
        assert [s.logprob for s in ours.tokens] == pytest.approx(
            [s.logprob for s in theirs.tokens], abs=1e-4
        )


@torch.inference_mode()
def test_a_rounded_window_goes_to_torch() -> None:
    model, found = remembering(DELTA), []
    for backend in (CpuBackend(model), TorchBackend(model)):
        cache = model.new_cache(1, 64, 5, "fill", "int8")
        for token in range(13):
            run = backend.begin(cache)
            assert not isinstance(run, CpuPass)
            start = run.embed(torch.tensor([[token]]))
            logits = run.logits(run.iterate(start, start, [1], 5))
            cache.advance([0])
        found.append(logits)
    assert torch.equal(*found)


@torch.inference_mode()
def test_text_after_a_picture_keeps_its_positions() -> None:
    """A picture's patches share positions, and stand on three axes when they are folded."""
    model = build(replace(PICTURES, memory="delta", memory_window=8, memory_block=4), torch.float32)
    grids = torch.tensor([(2, 3)])
    seen = MediaBatch(torch.rand(6, 48, generator=torch.manual_seed(1)) * 2 - 1, grids)
    tokens = torch.tensor([row(5, 6, (2, 3), 7, *range(10, 24))])
    whole, backend = model(tokens, 3, media={"image": seen}).logits[0], CpuBackend(model)
    cache = model.new_cache(1, 64, 3)
    model(tokens[:, :9], 3, cache, media={"image": seen})
    found = []
    for column in range(9, tokens.shape[1]):
        run = backend.begin(cache)
        assert isinstance(run, CpuPass)
        start = run.embed(tokens[:, [column]])
        found.append(run.logits(run.iterate(start, start, [1], 3))[0])
        cache.advance([0])
    torch.testing.assert_close(torch.cat(found), whole[9:], rtol=0, atol=1e-4)


def test_nothing_beyond_a_ring_is_read() -> None:
    model = remembering(DELTA)
    kernel, store = KernelModel(model), model.new_cache(2, 64, 5)
    cache = KernelCache.of(store)
    assert cache is not None
    for rows, first in ([2], 0), ([-1], 0), ([0], 5), ([0], -4):
        with pytest.raises(UsageError, match="beyond the cache"):
            kernel.fold(cache, rows, first, [1])
    with pytest.raises(UsageError, match="loop below 1"):
        kernel.fold(cache, [0], 0, [0])
    other = KernelCache.of(LoopCache(SMALL, 2, 4, 5))
    assert other is not None
    with pytest.raises(UsageError, match="beyond the cache"):
        kernel.embed(torch.tensor([1]), KernelRows(other, [0], [0], [0], [0]))


def test_cuda_graphs_name_the_memory() -> None:
    weight = SimpleNamespace(device=torch.device("cuda"))
    model: Any = SimpleNamespace(norm=SimpleNamespace(weight=weight), config=DELTA)
    why = cuda_graphs.unsupported_reason(model)
    assert why == "its layers have a memory beyond their window"
