"""The model by CUDA graphs: at batch 1, launch overhead exceeds the kernels' own time.

A graph replays the same kernels on the same memory. So a pass reads and writes fixed buffers
(`GraphPass`), the index of the column that it fills is a tensor, and attention reads a bucket of
the cache of fixed size, with a mask. Graphs are recorded only for a cache of one row and one token
at a time. Prompts, batches and the verification of drafts run by torch, since their kernels take
longer than the launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from looptx_core.backends.base import Backend, LoopResult, Pass
from looptx_core.backends.torch_backend import TorchPass
from looptx_core.media.batch import Media
from looptx_core.model.bitnet import BitLinear
from looptx_core.model.block import Block
from looptx_core.model.cache import FixedCacheView, LoopCache
from looptx_core.model.confidence import relative_change
from looptx_core.model.layer_state import KVState
from looptx_core.model.loop import LoopedTransformer
from looptx_core.stopping.rule import Exit, HeadOutput

_FIRST_BUCKET = 256
"""Columns that the first graphs attend to; each further set attends to four times as many."""


class CudaGraphBackend(Backend):
    """Keeps the graphs of the cache that was decoded last, until another is used."""

    name = "graph"
    reuses_cache = True

    def __init__(self, model: LoopedTransformer) -> None:
        super().__init__(model)
        self._cache: LoopCache | None = None
        self._passes: dict[int, GraphPass] = {}
        self._weights: tuple[int, ...] = ()

    def _addresses(self) -> tuple[int, ...]:
        return tuple(parameter.data_ptr() for parameter in self.model.parameters())

    def _after_other_work(self) -> None:
        """Invalidate what a pass without graphs, such as a prompt's, may have changed.

        The position is another, and graphs read freed memory if the weights were moved.
        """
        for recorded in self._passes.values():
            recorded.column = -1
        if self._weights != self._addresses():
            self._passes, self._weights = {}, self._addresses()

    def begin(
        self,
        cache: LoopCache,
        rows: Sequence[int] | None = None,
        new: int = 1,
        tokens: Tensor | None = None,
        media: Media | None = None,
    ) -> Pass:
        one = new == 1 and len(cache.lengths) == 1 and not cache.padded and not media
        if not one or not all(type(state) is KVState for state in cache.layers):
            if cache is self._cache:
                self._after_other_work()
            return TorchPass.of(self.model, cache, rows, new, tokens, media)
        if cache is not self._cache:
            self._cache, self._passes, self._weights = cache, {}, self._addresses()
        assert cache.capacity is not None and cache.has_room(cache.length + 1), "the cache is full"
        bucket = _FIRST_BUCKET
        while bucket <= cache.length:
            bucket *= 4
        bucket = min(bucket, cache.capacity)
        if bucket not in self._passes:
            self._passes[bucket] = GraphPass(self.model, cache, bucket)
        return self._passes[bucket].at(cache.length)


class GraphPass(Pass):
    """The next column of a cache of one row; each stage is recorded at its first use.

    bucket: columns that attention reads.
    """

    def __init__(self, model: LoopedTransformer, cache: LoopCache, bucket: int) -> None:
        weight = model.norm.weight
        self.model, self.view, self.column = model, FixedCacheView(cache, bucket), -1
        self.token = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
        self.state = torch.zeros(
            1, 1, model.config.state_width, dtype=weight.dtype, device=weight.device
        )
        self.embedding = self.state.new_zeros(1, 1, model.config.d_model)
        self.output = self.state.new_zeros(1, 1, model.config.vocab_size)
        self.head_output = self.state.new_zeros(3)
        self.ctx = model.context(1, self.view)
        assert isinstance(self.ctx.mask, Tensor)
        self._graphs: dict[tuple[str, int], Callable[[], object]] = {}
        self._pool = torch.cuda.graph_pool_handle() if weight.device.type == "cuda" else None

    def at(self, column: int) -> GraphPass:
        """Set the column to fill."""
        if column != self.column:
            self.view.columns.fill_(column)
            self._run("position", 0, self._set_position)
            self.column = column
        return self

    def embed(self, tokens: Tensor) -> Tensor:
        self.token.copy_(tokens)
        self._run("embed", 0, self._embed)
        return self.embedding.clone()

    def iterate(
        self, state: Tensor, embedding: Tensor, loops: Sequence[int], count: int = 1
    ) -> Tensor:
        self._load(state, embedding)
        for loop in range(loops[0], loops[0] + count):
            self._run_step(loop)
        return self.state.clone()

    def until_exit(
        self, state: Tensor, embedding: Tensor, loops: Sequence[int], exits: Sequence[Exit]
    ) -> LoopResult:
        [own], [loop] = exits, loops
        if own.reads_logits:
            return super().until_exit(state, embedding, loops, exits)
        self._load(state, embedding)
        while True:
            check = loop >= own.first_check
            self._run_step(loop, check)
            if check:
                output = HeadOutput(*self.head_output.tolist())
                if own.stops(loop, own.signals_of(output, loop)):
                    return LoopResult(self.state, loop - loops[0] + 1, [output])
            loop += 1

    def logits(self, state: Tensor, last: bool = False) -> Tensor:
        self._load(state)
        self._run("logits", 0, self._logits)
        return self.output.clone()

    def confidence(self, state: Tensor, loops: Sequence[int]) -> list[tuple[float, float]]:
        output = self.model.confidence(state, loops[0])
        return torch.cat([output.logit, output.gain], -1).tolist()

    def backfill(self, state: Tensor, embedding: Tensor, loops: Sequence[int]) -> None:
        self._load(state, embedding)
        body = partial(self.model.backfill, self.state, self.embedding, loops[0], self.ctx)
        self._run("backfill", loops[0], body)

    def _load(self, state: Tensor, embedding: Tensor | None = None) -> None:
        """Copy the inputs into the fixed buffers. state: as for `LoopedTransformer.iterate`."""
        if state is not self.state:
            self.state.copy_(self.model.injection.open(state))
        if embedding is not None and embedding is not self.embedding:
            self.embedding.copy_(embedding)

    def _run_step(self, loop: int, check: bool = False) -> None:
        self._run("checked step" if check else "step", loop, lambda: self._step(loop, check))

    # The stages that are recorded.

    def _set_position(self) -> None:
        now = self.model.context(1, self.view)
        for buffer, value in zip(self.ctx.buffers(), now.buffers(), strict=True):
            buffer.copy_(value)

    def _embed(self) -> None:
        self.embedding.copy_(self.model.embed(self.token, self.ctx))

    def _step(self, loop: int, check: bool) -> None:
        after = self.model.step(self.state, self.embedding, loop, self.ctx)
        if check:
            output, change = self.model.confidence(after, loop), relative_change(self.state, after)
            parts = [output.logit, output.gain, change.to(after)]
            self.head_output.copy_(torch.cat(parts).flatten())
        self.state.copy_(after)

    def _logits(self) -> None:
        self.output.copy_(self.model.head(self.model.coda_hidden(self.state, self.ctx)))

    def _run(self, part: str, loop: int, body: Callable[[], object]) -> None:
        """Replay a stage; at its first use run it plainly and record it."""
        if replay := self._graphs.get((part, loop)):
            replay()
            return
        if self._pool is None:
            self._graphs[part, loop] = body
            body()
            return
        with torch.cuda.device(self.state.device):
            warm_up = torch.cuda.Stream()  # libraries must be initialised before a recording
            warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up):
                body()
            torch.cuda.current_stream().wait_stream(warm_up)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                body()
        self._graphs[part, loop] = graph.replay


def unsupported_reason(model: LoopedTransformer) -> str | None:
    """Why the model can't be recorded, in a few words; None if it can."""
    if model.norm.weight.device.type != "cuda":
        return f"the model is on {model.norm.weight.device.type}"
    if model.config.has_memory:
        return "its layers have a memory beyond their window"
    blocks = [part for part in model.modules() if isinstance(part, Block)]
    layers = [part for block in blocks for part in block.modules() if isinstance(part, nn.Linear)]
    odd = {type(layer).__name__ for layer in layers if type(layer) not in (nn.Linear, BitLinear)}
    return f"its layers are {', '.join(sorted(odd))}" if odd else None
