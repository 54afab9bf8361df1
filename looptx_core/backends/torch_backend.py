"""The model by torch, on any device: the reference for every other back end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from looptx_core.backends.base import Backend, Pass
from looptx_core.media.batch import Media
from looptx_core.model.block import ForwardContext
from looptx_core.model.cache import LoopCache
from looptx_core.model.loop import LoopedTransformer


class TorchBackend(Backend):
    """Runs whatever the model supports."""

    name = "torch"

    def begin(
        self,
        cache: LoopCache,
        rows: Sequence[int] | None = None,
        new: int = 1,
        tokens: Tensor | None = None,
        media: Media | None = None,
    ) -> Pass:
        return TorchPass.of(self.model, cache, rows, new, tokens, media)

    def prompt(
        self, cache: LoopCache, rows: Sequence[int], tokens: Tensor, media: Media | None = None
    ) -> Iterator[tuple[Pass, Tensor]]:
        if not media:  # an item may lie in two passes
            yield from super().prompt(cache, rows, tokens)
            return
        first = 0
        for x, ctx in self.model.passes(tokens, cache, rows, media):
            yield TorchPass(self.model, ctx, x=x), tokens[:, first : first + x.shape[1]]
            first += x.shape[1]


class TorchPass(Pass):
    """See `Pass`."""

    def __init__(
        self,
        model: LoopedTransformer,
        ctx: ForwardContext,
        media: Media | None = None,
        x: Tensor | None = None,
    ) -> None:
        """x: what `LoopedTransformer.look_up` returned for the tokens, if it was called before."""
        self.model, self.ctx, self.media, self.x = model, ctx, media, x

    @classmethod
    def of(
        cls,
        model: LoopedTransformer,
        cache: LoopCache,
        rows: Sequence[int] | None,
        new: int,
        tokens: Tensor | None = None,
        media: Media | None = None,
    ) -> TorchPass:
        """See `Backend.begin`."""
        layout = None
        if media and tokens is not None:
            layout = model.layout(tokens, media, cache.start if cache.padded else None)
        ctx = model.context(new, cache.view(new, rows), layout=layout)
        return cls(model, ctx, media)

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.model.look_up(tokens, self.media) if self.x is None else self.x
        return self.model.run_prelude(x, self.ctx)

    def iterate(
        self, state: Tensor, embedding: Tensor, loops: Sequence[int], count: int = 1
    ) -> Tensor:
        if loops.count(loops[0]) == len(loops):
            span = range(loops[0], loops[0] + count)
            for _, after in self.model.iterate(state, embedding, self.ctx, span):
                state = after
            return state
        for more in range(count):
            state = self._mixed(state, embedding, [loop + more for loop in loops])
        return state

    def _mixed(self, state: Tensor, embedding: Tensor, loops: Sequence[int]) -> Tensor:
        """One loop of rows that are at different loops."""
        if self.model.enter_loop is None:
            index = torch.tensor(loops, device=state.device)
            return self.model.step(state, embedding, index, self.ctx)
        after = torch.empty_like(state)  # loops with their own weights run one after another
        for loop, which in _by_loop(loops):
            after[which] = self._subset(which).iterate(state[which], embedding[which], [loop])
        return after

    def _subset(self, which: list[int]) -> TorchPass:
        """The same pass for some of its rows."""
        view = self.ctx.view
        assert view is not None
        if len(which) == len(view.rows):
            return self
        return TorchPass.of(self.model, view.cache, [view.rows[i] for i in which], view.new)

    def logits(self, state: Tensor, last: bool = False) -> Tensor:
        hidden = self.model.coda_hidden(state, self.ctx)
        return self.model.head(hidden[:, -1:] if last else hidden)

    def confidence(self, state: Tensor, loops: Sequence[int]) -> list[tuple[float, float]]:
        alike = loops.count(loops[0]) == len(loops)
        index = loops[0] if alike else torch.tensor(loops, device=state.device)
        output = self.model.confidence(state, index)
        return torch.cat([output.logit, output.gain], -1).tolist()

    def backfill(self, state: Tensor, embedding: Tensor, loops: Sequence[int]) -> None:
        for loop, which in _by_loop(loops):
            ctx = self._subset(which).ctx
            self.model.backfill(state[which], embedding[which], loop, ctx)


def _by_loop(loops: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Each loop that occurs, with the indices of the rows that are at it."""
    return [(loop, [i for i, own in enumerate(loops) if own == loop]) for loop in set(loops)]
