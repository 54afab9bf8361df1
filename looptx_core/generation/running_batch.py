"""Rows on their way through the core: each at its own loop, each stopping by its own exit.

`step` runs the core on all active rows, each at its own loop index, until an exit check may fire
for one of them. Rows share the weights and differ only in the columns of the cache they fill. A row
that exits is read out at once, and others may join before the next step, so that the core works on
a full batch (continuous batching over depth, arXiv 2608.09444).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from looptx_core.backends.base import Backend, Pass
from looptx_core.media.batch import Media
from looptx_core.model.cache import LoopCache
from looptx_core.stopping.rule import Exit, HeadOutput


@dataclass
class WorkCounters:
    """What was done, counted in positions: what a test of speed can rely on."""

    prompt: int = 0
    """Positions of prompts."""
    embedded: int = 0
    """Passes of the prelude, prompts aside."""
    loops: int = 0
    """Passes of the core."""
    readouts: int = 0
    """Passes of coda and head."""
    exit_checks: int = 0
    """Evaluations of the confidence head."""
    drafted: int = 0
    """Tokens that shallow loops proposed."""
    accepted: int = 0
    """Those of them that full depth would have drawn too."""


class StepOutput(NamedTuple):
    """Rows that exited and were read out."""

    rows: list[int]
    """Of the cache's batch."""
    logits: Tensor
    """(rows, vocab_size)."""
    loops: list[int]
    """After which each row exited."""
    log_odds: list[float]
    """The confidence head's, before calibration."""


@dataclass
class _ActiveRow:
    """One row in the core."""

    row: int
    exit: Exit
    loop: int = 0
    logits: Tensor | None = None
    """After this loop, (vocab_size,), once they were read."""
    previous: Tensor | None = None
    """After the loop before, for the rules that read them."""
    log_odds: float = 0.0
    """The confidence head's, where it exits."""


class RunningBatch:
    """`add` rows, then `step` until they exit."""

    def __init__(
        self, backend: Backend, cache: LoopCache, counters: WorkCounters | None = None
    ) -> None:
        self.backend, self.cache = backend, cache
        self.counters = counters or WorkCounters()
        self._active: list[_ActiveRow] = []
        self._pass: Pass | None = None  # over all active rows; None: to be begun
        self._state: Tensor | None = None  # (active rows, 1, d_model), and so the next
        self._embedding: Tensor | None = None

    def __len__(self) -> int:
        """Rows in the core."""
        return len(self._active)

    def prompt(
        self, rows: Sequence[int], tokens: Tensor, loops: int, media: Media | None = None
    ) -> StepOutput:
        """Run prompts of one length, (rows, length), to one depth and read out their ends."""
        run = self.backend.begin(self.cache, rows, tokens.shape[1], tokens, media)
        embedding = run.embed(tokens)
        state = run.iterate(embedding, embedding, [1] * len(rows), loops)
        logits = run.logits(state, last=True)[:, -1]
        depths = [loops] * len(rows)
        if self.cache.needs_backfill(loops):
            run.backfill(state, embedding, depths)
        self.cache.view(tokens.shape[1], rows).advance()
        self.counters.prompt += tokens.numel()
        odds = [logit for logit, _ in run.confidence(state[:, -1:], depths)]
        return StepOutput(list(rows), logits, depths, odds)

    def add(self, rows: Sequence[int], tokens: Sequence[int], exits: Sequence[Exit]) -> None:
        """Rows join with their next tokens."""
        run = self.backend.begin(self.cache, rows)
        start = run.embed(torch.tensor(tokens, device=self.backend.device)[:, None])
        self.counters.embedded += len(rows)
        if self._state is None or self._embedding is None:
            self._state, self._embedding, self._pass = start, start, run
        else:
            self._state = torch.cat([self._state, start])
            self._embedding = torch.cat([self._embedding, start])
            self._pass = None
        self._active += [_ActiveRow(row, own) for row, own in zip(rows, exits)]

    def step(self) -> StepOutput | None:
        """Loop until a row may exit, or has to be checked; those that exit are read out."""
        active, counters = self._active, self.counters
        assert self._state is not None and self._embedding is not None, "no row is active"
        if self._pass is None:
            self._pass = self.backend.begin(self.cache, [own.row for own in active])
        loops = [own.loop + 1 for own in active]
        exits = [own.exit for own in active]
        self._state, count, outputs = self._pass.until_exit(
            self._state, self._embedding, loops, exits
        )
        for own in active:
            counters.exit_checks += own.exit.checks(own.loop, own.loop + count)
            own.loop += count
        counters.loops += count * len(active)
        if readers := [i for i, own in enumerate(active) if own.exit.reads_logits]:
            self._read_logits(readers)
        exiting = self._exiting(outputs)
        return self._finish(exiting) if exiting else None

    def run(self) -> list[StepOutput]:
        """Step until no row is active."""
        outputs = []
        while len(self):
            if output := self.step():
                outputs.append(output)
        return outputs

    def _subset(self, which: list[int]) -> tuple[Tensor, Tensor, Pass]:
        """States, embeddings and a pass of some of the active rows."""
        assert self._state is not None and self._embedding is not None
        if len(which) == len(self._active):
            assert self._pass is not None
            return self._state, self._embedding, self._pass
        run = self.backend.begin(self.cache, [self._active[i].row for i in which])
        return self._state[which], self._embedding[which], run

    def _read_logits(self, which: list[int]) -> None:
        state, _, run = self._subset(which)
        self.counters.readouts += len(which)
        for i, row in zip(which, run.logits(state)[:, -1]):
            self._active[i].previous, self._active[i].logits = self._active[i].logits, row

    def _exiting(self, outputs: list[HeadOutput]) -> list[int]:
        """Which active rows exit now."""
        exiting = []
        for i, (own, output) in enumerate(zip(self._active, outputs)):
            signals = own.exit.signals_of(output, own.loop, own.logits, own.previous)
            if own.exit.stops(own.loop, signals):
                own.log_odds = output.logit
                exiting.append(i)
        return exiting

    def _finish(self, exiting: list[int]) -> StepOutput:
        if unread := [i for i in exiting if self._active[i].logits is None]:
            self._read_logits(unread)
        gone = [self._active[i] for i in exiting]
        rows, loops = [own.row for own in gone], [own.loop for own in gone]
        if early := [i for i in exiting if self.cache.needs_backfill(self._active[i].loop)]:
            state, embedding, run = self._subset(early)
            run.backfill(state, embedding, [self._active[i].loop for i in early])
        self.cache.advance(rows)
        stay = sorted(set(range(len(self._active))) - set(exiting))
        self._active = [self._active[i] for i in stay]
        self._pass = None
        assert self._state is not None and self._embedding is not None
        self._state = self._state[stay] if stay else None
        self._embedding = self._embedding[stay] if stay else None
        return StepOutput(
            rows,
            torch.stack([own.logits for own in gone if own.logits is not None]),
            loops,
            [own.log_odds for own in gone],
        )
