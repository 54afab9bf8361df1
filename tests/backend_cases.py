"""A back end that reports how its passes run the core."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from looptx_core.backends.base import Backend, LoopResult, Pass

Watch = Callable[[Sequence[int], int, int], object]
"""(each row's first loop, how many loops, positions of each row)."""


class WatchedBackend(Backend):
    """Runs everything by another back end, and tells `watch` of every run of the core."""

    def __init__(self, inner: Backend, watch: Watch) -> None:
        super().__init__(inner.model)
        self.inner, self.watch = inner, watch
        self.reuses_cache = inner.reuses_cache

    def begin(self, *arguments, **named) -> Pass:
        return _WatchedPass(self.inner.begin(*arguments, **named), self.watch)


class _WatchedPass(Pass):
    def __init__(self, inner: Pass, watch: Watch) -> None:
        self.inner, self.watch = inner, watch
        self.embed, self.logits = inner.embed, inner.logits
        self.draft_logits, self.confidence = inner.draft_logits, inner.confidence
        self.backfill = inner.backfill

    def embed(self, tokens):  # replaced by the inner pass's
        raise AssertionError

    logits = confidence = backfill = embed

    def iterate(self, state, embedding, loops, count=1):
        self.watch(loops, count, state.shape[1])
        return self.inner.iterate(state, embedding, loops, count)

    def until_exit(self, state, embedding, loops, exits) -> LoopResult:
        result = self.inner.until_exit(state, embedding, loops, exits)
        self.watch(loops, result.loops_run, 1)
        return result
