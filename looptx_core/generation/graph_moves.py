"""The model's moves as CUDA graphs: at one token a pass, launching kernels takes longer than they.

A graph replays the same kernels on the same memory. So what a pass reads and writes stands in
buffers that stay (`_Track`), the column that it fills is a number on the device, and attention
looks at a bounded stretch of the cache, behind a mask. Only a cache of one row is recorded, one
token at a time; prompts, batches and verified drafts go through torch as they are, where numbers
take longer than calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from looptx_core.generation.exits import Exit, calibrated
from looptx_core.generation.moves import Moves, Place, Ride
from looptx_core.media.batch import Media
from looptx_core.model.bitnet import BitLinear
from looptx_core.model.block import Block
from looptx_core.model.cache import FixedWindow, LoopCache
from looptx_core.model.confidence import relative_change
from looptx_core.model.loop import LoopedTransformer

_STRETCH = 256
"""Columns that the first graphs look at; each further set looks at four times as many."""


class GraphMoves(Moves):
    """Keeps hold of the cache that was decoded last, whose graphs it has, until another comes."""

    keeps_cache = True

    def __init__(self, model: LoopedTransformer) -> None:
        super().__init__(model)
        self._cache: LoopCache | None = None
        self._tracks: dict[int, _Track] = {}
        self._weights: tuple[int, ...] = ()

    def _addresses(self) -> tuple[int, ...]:
        return tuple(parameter.data_ptr() for parameter in self.model.parameters())

    def _something_else(self) -> None:
        """A pass that is not recorded, as a prompt's, moves positions; and weights that were moved
        before it are not those that the graphs read."""
        for track in self._tracks.values():
            track.column = -1
        if self._weights != self._addresses():
            self._tracks, self._weights = {}, self._addresses()

    def at(
        self,
        cache: LoopCache,
        rows: Sequence[int] | None = None,
        new: int = 1,
        tokens: Tensor | None = None,
        media: Media | None = None,
    ) -> Place:
        if new > 1 or len(cache.lengths) > 1 or cache.padded or media:
            if cache is self._cache:
                self._something_else()
            return super().at(cache, rows, new, tokens, media)
        if cache is not self._cache:
            self._cache, self._tracks, self._weights = cache, {}, self._addresses()
        stop = _STRETCH
        while stop <= cache.length:
            stop *= 4
        stop = min(stop, cache.capacity)
        if stop not in self._tracks:
            self._tracks[stop] = _Track(self.model, cache, stop)
        return self._tracks[stop].to(cache.length)

    def encode(self, tokens: Tensor, place: Place, media: Media | None = None) -> Tensor:
        if not isinstance(place, _Track):
            return super().encode(tokens, place, media)
        return place.encode(tokens).clone()

    def step(
        self,
        state: Tensor,
        embedding: Tensor,
        loops: Sequence[int],
        place: Place,
        further: int = 0,
    ) -> Tensor:
        if not isinstance(place, _Track):
            return super().step(state, embedding, loops, place, further)
        place.take(state, embedding)
        for loop in range(loops[0], loops[0] + 1 + further):
            place.step(loop)
        return place.state.clone()

    def ride(
        self,
        state: Tensor,
        embedding: Tensor,
        loops: Sequence[int],
        place: Place,
        exits: Sequence[Exit],
    ) -> Ride:
        if not isinstance(place, _Track) or exits[0].reads_logits:
            return super().ride(state, embedding, loops, place, exits)
        own, loop = exits[0], loops[0]
        sure, least = own.bounds()
        place.take(state, embedding)
        while True:
            place.step(loop, judge=loop >= own.first_look)
            if loop >= own.first_look:
                logit, gain, change = place.judgement.tolist()
                _, nats = calibrated(logit, gain, change, loop, own.settings)
                if loop >= own.max_loops or logit >= sure or nats < least:
                    return Ride(place.state, loop - loops[0] + 1, [(logit, gain, change)])
            loop += 1

    def decode(self, state: Tensor, place: Place, last: bool = False) -> Tensor:
        if not isinstance(place, _Track):
            return super().decode(state, place, last)
        place.take(state)
        return place.decode().clone()

    def leave(self, state: Tensor, embedding: Tensor, loops: Sequence[int], place: Place) -> None:
        if not isinstance(place, _Track):
            super().leave(state, embedding, loops, place)
        else:
            place.take(state, embedding)
            place.leave(loops[0])


class _Track:
    """The next column of a cache of one row, and the moves there, recorded at their first use."""

    def __init__(self, model: LoopedTransformer, cache: LoopCache, stop: int) -> None:
        weight = model.norm.weight
        self.model, self.window, self.column = model, FixedWindow(cache, stop), -1
        self.token = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
        self.state = torch.zeros(
            1, 1, model.config.d_model, dtype=weight.dtype, device=weight.device
        )
        self.embedding = torch.zeros_like(self.state)
        self.logits = self.state.new_zeros(1, 1, model.config.vocab_size)
        self.judgement = self.state.new_zeros(3)
        self.around = model.surroundings(1, self.window)
        assert isinstance(self.around.mask, Tensor)
        self._graphs: dict[tuple[str, int], Callable[[], object]] = {}
        self._pool = torch.cuda.graph_pool_handle() if weight.device.type == "cuda" else None

    def to(self, column: int) -> _Track:
        """Stand at this column."""
        assert column < self.window.cache.capacity, "the cache is full"
        if column != self.column:
            self.window.columns.fill_(column)
            self._run("place", 0, self._place)
            self.column = column
        return self

    def take(self, state: Tensor, embedding: Tensor | None = None) -> None:
        """Go on from these, (1, 1, d_model)."""
        if state is not self.state:
            self.state.copy_(state)
        if embedding is not None and embedding is not self.embedding:
            self.embedding.copy_(embedding)

    def encode(self, tokens: Tensor) -> Tensor:
        self.token.copy_(tokens)
        self._run("encode", 0, self._encode)
        return self.embedding

    def step(self, loop: int, judge: bool = False) -> None:
        self._run("judged step" if judge else "step", loop, lambda: self._step(loop, judge))

    def decode(self) -> Tensor:
        self._run("decode", 0, self._decode)
        return self.logits

    def leave(self, loop: int) -> None:
        leave = partial(self.model.leave, self.state, self.embedding, loop, self.around)
        self._run("leave", loop, leave)

    def _place(self) -> None:
        now = self.model.surroundings(1, self.window)
        assert isinstance(now.mask, Tensor) and isinstance(self.around.mask, Tensor)
        self.around.mask.copy_(now.mask)
        for buffer, value in zip(self.around.rotary, now.rotary):
            buffer.copy_(value)

    def _encode(self) -> None:
        self.embedding.copy_(self.model.encode(self.token, self.around))

    def _step(self, loop: int, judge: bool) -> None:
        after = self.model.step(self.state, self.embedding, loop, self.around)
        if judge:
            said, change = self.model.confidence(after, loop), relative_change(self.state, after)
            self.judgement.copy_(torch.cat([said.logit, said.gain, change.to(after)]).flatten())
        self.state.copy_(after)

    def _decode(self) -> None:
        self.logits.copy_(self.model.head(self.model.decode(self.state, self.around)))

    def _run(self, move: str, loop: int, body: Callable[[], object]) -> None:
        """Replay a move; at its first use make it as it is, and record it."""
        if replay := self._graphs.get((move, loop)):
            replay()
            return
        if self._pool is None:
            self._graphs[move, loop] = body
            body()
            return
        with torch.cuda.device(self.state.device):
            aside = torch.cuda.Stream()  # where libraries set themselves up before a recording
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                body()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                body()
        self._graphs[move, loop] = graph.replay


def obstacle(model: LoopedTransformer) -> str | None:
    """Why the moves can't be recorded, in a few words; None where they can."""
    if model.norm.weight.device.type != "cuda":
        return f"the model is on {model.norm.weight.device.type}"
    blocks = [part for part in model.modules() if isinstance(part, Block)]
    layers = [part for block in blocks for part in block.modules() if isinstance(part, nn.Linear)]
    odd = {type(layer).__name__ for layer in layers if type(layer) not in (nn.Linear, BitLinear)}
    return f"its layers are {', '.join(sorted(odd))}" if odd else None
