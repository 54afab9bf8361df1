"""The model's moves for tokens of some rows of a cache, by torch on any device.

The engine speaks to a model through these alone, so that a faster way to make the same moves can
stand in their place; this one is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looptx_core.generation.exits import Exit
from looptx_core.media.batch import Media
from looptx_core.model.cache import LoopCache, Window
from looptx_core.model.confidence import relative_change
from looptx_core.model.loop import LoopedTransformer


@dataclass
class Work:
    """What was done, counted in positions: what a test of speed can rely on."""

    prompt: int = 0
    """Positions of prompts."""
    encoded: int = 0
    """Passes of the prelude, prompts aside."""
    loops: int = 0
    """Passes of the core."""
    readouts: int = 0
    """Passes of coda and head."""
    judged: int = 0
    """Looks of the confidence head."""
    drafted: int = 0
    """Tokens that shallow loops proposed."""
    accepted: int = 0
    """Those of them that full depth would have drawn too."""


class Ride(NamedTuple):
    """Where a ride has got to."""

    state: Tensor
    """(rows, 1, d_model)."""
    passes: int
    """Of the core, by each row."""
    judged: list[tuple[float, float, float]]
    """After the last pass: `Moves.judge`, and by how much it changed the state. A gain that no
    row's exit looks at may be left at 0."""


Place = Any
"""Where the tokens of a pass stand; made by `Moves.at`, and read by its maker alone."""


class Moves:
    """A token at a place: encode it, loop it, read it out, ask how sure it is."""

    keeps_cache = False
    """Whether a cache that was used before is worth more than a new one."""

    def __init__(self, model: LoopedTransformer) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def at(
        self,
        cache: LoopCache,
        rows: Sequence[int] | None = None,
        new: int = 1,
        tokens: Tensor | None = None,
        media: Media | None = None,
    ) -> Place:
        """The place of the next `new` tokens of these rows, or of all.

        tokens: (rows, new), asked for where media are among them.
        """
        layout = None
        if media and tokens is not None:
            layout = self.model.layout(tokens, media, cache.start if cache.padded else None)
        return self.model.surroundings(new, cache.window(new, rows), layout=layout)

    def encode(self, tokens: Tensor, place: Place, media: Media | None = None) -> Tensor:
        """tokens (rows, new) -> what the loops start from, (rows, new, d_model)."""
        return self.model.encode(tokens, place, media)

    def step(
        self,
        state: Tensor,
        embedding: Tensor,
        loops: Sequence[int],
        place: Place,
        further: int = 0,
    ) -> Tensor:
        """The states after one more loop, and `further` ones; `loops`: each row's, from 1."""
        for more in range(1 + further):
            state = self._once(state, embedding, [loop + more for loop in loops], place)
        return state

    def _once(self, state: Tensor, embedding: Tensor, loops: Sequence[int], place: Place) -> Tensor:
        if loops.count(loops[0]) == len(loops):
            return self.model.step(state, embedding, loops[0], place)
        if self.model.enter_loop is None:
            index = torch.tensor(loops, device=state.device)
            return self.model.step(state, embedding, index, place)
        after = torch.empty_like(state)  # loops with weights of their own go one by one
        for loop in set(loops):
            which = [i for i, own in enumerate(loops) if own == loop]
            after[which] = self._once(
                state[which], embedding[which], [loop], self._some(place, which)
            )
        return after

    def _some(self, place: Place, which: list[int]) -> Place:
        window = place.window
        assert isinstance(window, Window), "made by `at`"
        return self.at(window.cache, [window.rows[i] for i in which], window.new)

    def ride(
        self,
        state: Tensor,
        embedding: Tensor,
        loops: Sequence[int],
        place: Place,
        exits: Sequence[Exit],
    ) -> Ride:
        """On to the next loop after which one of the rows, (rows, 1, d_model), may have to leave.

        loops: each row's next, from 1. exits: each row's own.
        """
        passes = min(own.next_look(loop - 1) - loop + 1 for own, loop in zip(exits, loops))
        if passes > 1:
            state = self.step(state, embedding, loops, place, further=passes - 2)
        last = [loop + passes - 1 for loop in loops]
        after = self.step(state, embedding, last, place)
        changes = relative_change(state, after).flatten().tolist()
        return Ride(after, passes, [(*w, c) for w, c in zip(self.judge(after, last), changes)])

    def decode(self, state: Tensor, place: Place, last: bool = False) -> Tensor:
        """Logits (rows, new, vocab_size); of each row's last token alone where so asked."""
        read = self.model.decode(state, place)
        return self.model.head(read[:, -1:] if last else read)

    def draft(self, state: Tensor, place: Place) -> Tensor:
        """`decode` where a guess will do."""
        return self.decode(state, place)

    def judge(self, state: Tensor, loops: Sequence[int]) -> list[tuple[float, float]]:
        """The confidence head's words on states (rows, 1, d_model): log-odds and gain."""
        alike = loops.count(loops[0]) == len(loops)
        index = loops[0] if alike else torch.tensor(loops, device=state.device)
        judged = self.model.confidence(state, index)
        return torch.cat([judged.logit, judged.gain], -1).tolist()

    def leave(self, state: Tensor, embedding: Tensor, loops: Sequence[int], place: Place) -> None:
        """The tokens end, each row's after its loop: leave what later ones that go deeper will look
        for. Only where `LoopCache.leaves` says so."""
        window = place.window
        for loop in set(loops):
            some = [i for i, own in enumerate(loops) if own == loop]
            around = place
            if len(some) < len(loops):
                around = Moves.at(self, window.cache, [window.rows[i] for i in some], window.new)
            self.model.leave(state[some], embedding[some], loop, around)
