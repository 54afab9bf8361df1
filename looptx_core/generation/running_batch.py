"""The rows that are in the core, each at its own loop and with its own exit.

`RunningBatch.step` runs the core on all active rows until the exit of at least one has to be
checked. Rows share the weights and differ only in the cache entries that they read and write. A row
that exits is read out at once, and others may join before the next step, so that the core works on
a full batch (continuous batching over depth, arXiv 2608.09444).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """How much work was done, in token positions; exact, so that tests of speed can rely on it."""

    prompt: int = 0
    """Positions of prompts; the next four counters leave these out."""
    embedded: int = 0
    """Passes of the prelude."""
    loops: int = 0
    """Passes of the core."""
    readouts: int = 0
    """Passes of coda and head."""
    exit_checks: int = 0
    """Evaluations of the confidence head."""
    drafted: int = 0
    """Tokens that shallow loops proposed."""
    accepted: int = 0
    """Drafted tokens that full depth accepted."""


class StepOutput(NamedTuple):
    """The rows that exited in a step, and what they predict."""

    rows: list[int]
    """Indices in the cache's batch."""
    logits: Tensor
    """(rows, vocab_size)."""
    loops: list[int]
    """The loop after which each row exited."""
    log_odds: list[float]
    """The confidence head's logit of each row, before calibration."""

    def of(self, which: Sequence[int]) -> StepOutput:
        """Some of its rows, by their indices in `rows`."""
        return StepOutput(
            [self.rows[i] for i in which],
            self.logits[list(which)],
            [self.loops[i] for i in which],
            [self.log_odds[i] for i in which],
        )


class PromptOutput(NamedTuple):
    """What a piece of some prompts predicts."""

    last: StepOutput
    """After the last token of each row."""
    logits: Tensor | None
    """After every token, (rows, length, vocab_size), if that was asked for."""


@dataclass
class _ActiveRow:
    """One row in the core."""

    row: int
    """Index in the cache's batch."""
    exit: Exit
    loop: int = 0
    """Loops that it has run."""
    logits: Tensor | None = None
    """After this loop, (vocab_size,), if they were computed."""
    previous: Tensor | None = None
    """After the loop before, for rules that compare both."""
    log_odds: float = 0.0
    """The confidence head's logit at its exit."""


class RunningBatch:
    """`add` rows with their next tokens, then call `step` until they exit."""

    def __init__(
        self, backend: Backend, cache: LoopCache, counters: WorkCounters | None = None
    ) -> None:
        self.backend, self.cache = backend, cache
        self.counters = counters or WorkCounters()
        self.on_prompt: Callable[[int], object] | None = None
        """Called with the tokens of each pass over a prompt."""
        self._active: list[_ActiveRow] = []
        self._pass: Pass | None = None  # over all active rows; None if they have changed
        # (active rows, 1, width); None if no row is active.
        self._state: Tensor | None = None
        self._embedding: Tensor | None = None

    def __len__(self) -> int:
        """How many rows are in the core."""
        return len(self._active)

    def prompt(
        self,
        rows: Sequence[int],
        tokens: Tensor,
        loops: int,
        media: Media | None = None,
        every: bool = False,
    ) -> PromptOutput:
        """Run pieces of prompts, (rows, length), for `loops` loops, after what the rows hold.

        media: the items that stand in these pieces. every: read out every token, not the last only.
        """
        depths = [loops] * len(rows)
        found: list[Tensor] = []
        for run, part in self.backend.prompt(self.cache, rows, tokens, media):
            embedding = run.embed(part)
            state = run.iterate(embedding, embedding, [1] * len(rows), loops)
            logits = run.logits(state, last=not every)
            found = [*found, logits] if every else [logits]  # of a long prompt only the last
            if self.cache.needs_backfill(loops, rows):
                run.backfill(state, embedding, depths)
            self.cache.view(part.shape[1], rows).advance()
            self.counters.prompt += part.numel()
            if self.on_prompt:
                self.on_prompt(part.numel())
        odds = [logit for logit, _ in run.confidence(state[:, -1:], depths)]
        last = StepOutput(list(rows), found[-1][:, -1], depths, odds)
        return PromptOutput(last, torch.cat(found, 1) if every else None)

    def add(self, rows: Sequence[int], tokens: Sequence[int], exits: Sequence[Exit]) -> None:
        """Let rows join: their next tokens run the prelude and wait for the next `step`."""
        run = self.backend.begin(self.cache, rows)
        start = run.embed(torch.tensor(tokens, device=self.backend.device)[:, None])
        state = self.backend.model.injection.open(start)
        self.counters.embedded += len(rows)
        if self._state is None or self._embedding is None:
            self._state, self._embedding, self._pass = state, start, run
        else:
            self._state = torch.cat([self._state, state])
            self._embedding = torch.cat([self._embedding, start])
            self._pass = None
        self._active += [_ActiveRow(row, own) for row, own in zip(rows, exits)]

    @property
    def rows(self) -> list[int]:
        """The rows in the core."""
        return [own.row for own in self._active]

    def drop(self, row: int) -> None:
        """Take a row out of the core, at whichever loop it is."""
        self._keep([i for i, own in enumerate(self._active) if own.row != row])

    def step(self) -> StepOutput | None:
        """Loop until a row's exit has to be checked, and read out the rows that exit.

        None if no row exits.
        """
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
        """Call `step` until no row is active."""
        outputs = []
        while len(self):
            if output := self.step():
                outputs.append(output)
        return outputs

    def _subset(self, which: list[int]) -> tuple[Tensor, Tensor, Pass]:
        """States, embeddings and a pass of some active rows, by their indices in `_active`."""
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
        """Indices in `_active` of the rows that exit now."""
        exiting = []
        for i, (own, output) in enumerate(zip(self._active, outputs)):
            signals = own.exit.signals_of(output, own.loop, own.logits, own.previous)
            if own.exit.stops(own.loop, signals):
                own.log_odds = output.logit
                exiting.append(i)
        return exiting

    def _finish(self, exiting: list[int]) -> StepOutput:
        """Read out the exiting rows, backfill their caches, and remove them from the core."""
        if unread := [i for i in exiting if self._active[i].logits is None]:
            self._read_logits(unread)
        gone = [self._active[i] for i in exiting]
        rows, loops = [own.row for own in gone], [own.loop for own in gone]
        needed = self.cache.needs_backfill
        if early := [i for i, own in zip(exiting, gone) if needed(own.loop, [own.row])]:
            state, embedding, run = self._subset(early)
            run.backfill(state, embedding, [self._active[i].loop for i in early])
        self.cache.advance(rows)
        self._keep(sorted(set(range(len(self._active))) - set(exiting)))
        return StepOutput(
            rows,
            torch.stack([own.logits for own in gone if own.logits is not None]),
            loops,
            [own.log_odds for own in gone],
        )

    def _keep(self, which: list[int]) -> None:
        """Remove all rows from the core but these, by their indices in `_active`."""
        self._active = [self._active[i] for i in which]
        self._pass = None
        assert self._state is not None and self._embedding is not None
        self._state = self._state[which] if which else None
        self._embedding = self._embedding[which] if which else None
