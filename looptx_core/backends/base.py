"""What a back end is: it begins a `Pass` over the next tokens of some rows of a cache.

The engine speaks to a model through these two classes alone. `Pass.until_exit` is written once, by
the other methods; a back end that can loop without asking Python in between overrides it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from looptx_core.media.batch import Media
from looptx_core.model.cache import LoopCache
from looptx_core.model.confidence import relative_change
from looptx_core.model.loop import LoopedTransformer
from looptx_core.stopping.rule import Exit, HeadOutput


class LoopResult(NamedTuple):
    """Where `Pass.until_exit` stopped."""

    state: Tensor
    """(rows, 1, d_model)."""
    loops_run: int
    """Passes of the core, the same for each row."""
    outputs: list[HeadOutput]
    """Each row's, after the last loop. A gain that no row's exit looks at may be left at 0."""


class Pass(ABC):
    """The next `new` tokens of some rows on their way through the model.

    States are (rows, new, d_model). `loops` gives each row its loop, counted from 1.
    """

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (rows, new) -> the prelude's output, from which the loops start."""

    @abstractmethod
    def iterate(
        self, state: Tensor, embedding: Tensor, loops: Sequence[int], count: int = 1
    ) -> Tensor:
        """The state after `count` loops; `loops` are the first of them."""

    @abstractmethod
    def logits(self, state: Tensor, last: bool = False) -> Tensor:
        """Coda and head: (rows, new, vocab_size); of each row's last token alone if `last`."""

    def draft_logits(self, state: Tensor) -> Tensor:
        """`logits` where a guess will do."""
        return self.logits(state)

    @abstractmethod
    def confidence(self, state: Tensor, loops: Sequence[int]) -> list[tuple[float, float]]:
        """The confidence head's output, log-odds and gain, for states (rows, 1, d_model)."""

    @abstractmethod
    def backfill(self, state: Tensor, embedding: Tensor, loops: Sequence[int]) -> None:
        """The tokens exit, each row's after its loop: write what deeper, later tokens will attend
        to. Only where `LoopCache.needs_backfill` says so."""

    def until_exit(
        self, state: Tensor, embedding: Tensor, loops: Sequence[int], exits: Sequence[Exit]
    ) -> LoopResult:
        """Loop (rows, 1, d_model) until the exit of at least one row has to be checked.

        loops: each row's next. exits: each row's own. A back end may go on as long as no row can
        stop.
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
    """Runs one model."""

    name: str
    reuses_cache = False
    """Whether a cache that was used before is worth more than a new one."""

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
        """A pass over the next `new` tokens of these rows, or of all.

        tokens: (rows, new), needed where media are among them.
        """
