"""What a back end is: `Backend.begin` makes a `Pass` over the next tokens of some rows of a cache.

The engine runs a model through these two classes alone. `Pass.until_exit` is written once, in terms
of the other methods; a back end that can loop without returning to Python overrides it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from looptx_core.media.batch import Media
from looptx_core.model.cache import LoopCache
from looptx_core.model.confidence import relative_change
from looptx_core.model.loop import LoopedTransformer
from looptx_core.stopping.rule import Exit, HeadOutput


class LoopResult(NamedTuple):
    """The state at which `Pass.until_exit` stopped."""

    state: Tensor
    """(rows, 1, d_model)."""
    loops_run: int
    """How many loops were run, the same number for each row."""
    outputs: list[HeadOutput]
    """The confidence head's output for each row after the last loop. Its gain may be 0 if no row's
    exit uses it."""


class Pass(ABC):
    """One forward pass, in stages, over the next `new` tokens of some rows.

    States are (rows, new, d_model). The argument `loops` has each row's loop, counted from 1.
    """

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (rows, new) -> the prelude's output, which is the state before the first loop."""

    @abstractmethod
    def iterate(
        self, state: Tensor, embedding: Tensor, loops: Sequence[int], count: int = 1
    ) -> Tensor:
        """The state after `count` loops, of which `loops` are the first."""

    @abstractmethod
    def logits(self, state: Tensor, last: bool = False) -> Tensor:
        """Coda and head: (rows, new, vocab_size), or (rows, 1, vocab_size) for the last token."""

    def draft_logits(self, state: Tensor) -> Tensor:
        """`logits` for drafts, which may be less exact and faster."""
        return self.logits(state)

    @abstractmethod
    def confidence(self, state: Tensor, loops: Sequence[int]) -> list[tuple[float, float]]:
        """The confidence head's (log-odds, gain) of each row, for states (rows, 1, d_model)."""

    @abstractmethod
    def backfill(self, state: Tensor, embedding: Tensor, loops: Sequence[int]) -> None:
        """Write what later, deeper tokens will attend to; each row's tokens exit after its loop.

        To be called only where `LoopCache.needs_backfill`.
        """

    def until_exit(
        self, state: Tensor, embedding: Tensor, loops: Sequence[int], exits: Sequence[Exit]
    ) -> LoopResult:
        """Loop until the exit of at least one row has to be checked.

        state, embedding: (rows, 1, d_model). loops: the loop that each row runs next. exits: of
        each row. A back end may run further as long as no row can stop.
        """
        count = min(own.next_check(loop - 1) - loop + 1 for own, loop in zip(exits, loops))
        if count > 1:
            state = self.iterate(state, embedding, loops, count - 1)
        last = [loop + count - 1 for loop in loops]
        after = self.iterate(state, embedding, last)
        changes = relative_change(state, after).flatten().tolist()
        outputs = [HeadOutput(*out, c) for out, c in zip(self.confidence(after, last), changes)]
        return LoopResult(after, count, outputs)


class Backend(ABC):
    """Runs one model while generating."""

    name: str
    reuses_cache = False
    """Whether the engine should use a cache again, because work is tied to its memory."""

    def __init__(self, model: LoopedTransformer) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @abstractmethod
    def begin(
        self,
        cache: LoopCache,
        rows: Sequence[int] | None = None,
        new: int = 1,
        tokens: Tensor | None = None,
        media: Media | None = None,
    ) -> Pass:
        """A pass over the next `new` tokens of these rows, by default of all.

        tokens, media: (rows, new) ids and the items of their placeholders; needed only if there
        are media.
        """

    def prompt(
        self, cache: LoopCache, rows: Sequence[int], tokens: Tensor, media: Media | None = None
    ) -> Iterator[tuple[Pass, Tensor]]:
        """The passes that a prompt takes, and the tokens of each, (rows, new).

        Each pass has to be finished, and the cache advanced, before the next is asked for. tokens,
        media: see `begin`.
        """
        for columns in cache.parts(tokens.shape[1], rows):
            part = tokens[:, columns]
            yield self.begin(cache, rows, part.shape[1], part, media), part
