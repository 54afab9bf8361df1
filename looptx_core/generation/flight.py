"""Rows on their way through the core: each at its own loop, each leaving by its own exit.

One turn is a ride: passes of the core over all rows that are in it, whatever loop each has reached,
until one may leave. They share the weights, and only their places in the cache differ. Who leaves
is read out at once, and others may enter before the next turn, so that the core works on a full
batch (continuous batching over depth, arXiv 2608.09444).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from looptx_core.config.generation import ExitSettings
from looptx_core.generation.exits import Exit, Readout, calibrated
from looptx_core.generation.moves import Moves, Place, Work
from looptx_core.media.batch import Media
from looptx_core.model.cache import LoopCache


class Landing(NamedTuple):
    """Rows that were read out: what they predict, from how deep, and how sure."""

    rows: list[int]
    """Of the cache's batch."""
    logits: Tensor
    """(rows, vocab_size)."""
    loops: list[int]
    odds: list[float]
    """The confidence head's, logarithms."""


@dataclass
class _Rider:
    """One row in the core."""

    row: int
    exit: Exit
    loop: int = 0
    logits: Tensor | None = None
    """After this loop, (vocab_size,), once they were read."""
    previous: Tensor | None = None
    """After the loop before, for the rules that read them."""
    odds: float = 0.0
    """The confidence head's log-odds where it leaves."""


class Flight:
    """`enter` rows, then `turn` until they land."""

    def __init__(
        self, moves: Moves, cache: LoopCache, settings: ExitSettings, work: Work | None = None
    ) -> None:
        self.moves, self.cache, self.settings = moves, cache, settings
        self.work = work or Work()
        self._riders: list[_Rider] = []
        self._place: Place | None = None  # all riders' own; None: to be made
        self._state: Tensor | None = None  # (riders, 1, d_model), and so the next
        self._embedding: Tensor | None = None

    def __len__(self) -> int:
        """Rows in the core."""
        return len(self._riders)

    def prompt(
        self, rows: Sequence[int], tokens: Tensor, loops: int, media: Media | None = None
    ) -> Landing:
        """Run prompts of one length, (rows, length), to one depth and read out their ends."""
        moves = self.moves
        place = moves.at(self.cache, rows, tokens.shape[1], tokens, media)
        state = embedding = moves.encode(tokens, place, media)
        state = moves.step(state, embedding, [1], place, further=loops - 1)
        logits = moves.decode(state, place, last=True)[:, -1]
        depths = [loops] * len(rows)
        if self.cache.leaves(loops):
            moves.leave(state, embedding, depths, place)
        self.cache.window(tokens.shape[1], rows).advance()
        self.work.prompt += tokens.numel()
        odds = [logit for logit, _ in moves.judge(state[:, -1:], depths)]
        return Landing(list(rows), logits, depths, odds)

    def enter(self, rows: Sequence[int], tokens: Sequence[int], exits: Sequence[Exit]) -> None:
        """Rows begin with their next tokens."""
        place = self.moves.at(self.cache, rows)
        index = torch.tensor(tokens, device=self.moves.device)[:, None]
        start = self.moves.encode(index, place)
        self.work.encoded += len(rows)
        if self._state is None or self._embedding is None:
            self._state, self._embedding, self._place = start, start, place
        else:
            self._state = torch.cat([self._state, start])
            self._embedding = torch.cat([self._embedding, start])
            self._place = None
        self._riders += [_Rider(row, own) for row, own in zip(rows, exits)]

    def turn(self) -> Landing | None:
        """On until a row may leave, or has to be looked at; those that leave are read out."""
        riders, work = self._riders, self.work
        assert self._state is not None and self._embedding is not None, "nobody has entered"
        if self._place is None:
            self._place = self.moves.at(self.cache, [rider.row for rider in riders])
        loops = [rider.loop + 1 for rider in riders]
        exits = [rider.exit for rider in riders]
        self._state, passes, judged = self.moves.ride(
            self._state, self._embedding, loops, self._place, exits
        )
        for rider in riders:
            work.judged += rider.exit.looks(rider.loop, rider.loop + passes)
            rider.loop += passes
        work.loops += passes * len(riders)
        if readers := [i for i, rider in enumerate(riders) if rider.exit.reads_logits]:
            self._read(readers)
        go = self._leaving(judged)
        return self._land(go) if go else None

    def run(self) -> list[Landing]:
        """Turn until all have landed."""
        landings = []
        while len(self):
            if landing := self.turn():
                landings.append(landing)
        return landings

    def _some(self, which: list[int]) -> tuple[Tensor, Tensor, Place]:
        """States, embeddings and place of some of the riders."""
        assert self._state is not None and self._embedding is not None
        if len(which) == len(self._riders):
            return self._state, self._embedding, self._place
        place = self.moves.at(self.cache, [self._riders[i].row for i in which])
        return self._state[which], self._embedding[which], place

    def _read(self, which: list[int]) -> None:
        state, _, place = self._some(which)
        logits = self.moves.decode(state, place)[:, -1]
        self.work.readouts += len(which)
        for i, row in zip(which, logits):
            self._riders[i].previous, self._riders[i].logits = self._riders[i].logits, row

    def _leaving(self, judged: list[tuple[float, float, float]]) -> list[int]:
        """Which riders are let go by their exits. judged: `Ride.judged`."""
        go = []
        for i, (rider, words) in enumerate(zip(self._riders, judged)):
            read = calibrated(*words, rider.loop, self.settings)
            if rider.exit.stops(rider.loop, Readout(*read, rider.logits, rider.previous)):
                rider.odds = words[0]
                go.append(i)
        return go

    def _land(self, go: list[int]) -> Landing:
        if unread := [i for i in go if self._riders[i].logits is None]:
            self._read(unread)
        gone = [self._riders[i] for i in go]
        rows, loops = [rider.row for rider in gone], [rider.loop for rider in gone]
        if early := [i for i in go if self.cache.leaves(self._riders[i].loop)]:
            state, embedding, place = self._some(early)
            self.moves.leave(state, embedding, [self._riders[i].loop for i in early], place)
        self.cache.grow(rows)
        stay = sorted(set(range(len(self._riders))) - set(go))
        self._riders = [self._riders[i] for i in stay]
        self._place = None
        assert self._state is not None and self._embedding is not None
        self._state = self._state[stay] if stay else None
        self._embedding = self._embedding[stay] if stay else None
        return Landing(
            rows,
            torch.stack([rider.logits for rider in gone if rider.logits is not None]),
            loops,
            [rider.odds for rider in gone],
        )
