"""Continuous batching over requests and over depth.

A request starts as soon as a row of the cache is free. Its prompt is read in pieces, between the
tokens of the requests that are being continued. After that, each of its tokens loops beside the
other active rows, which may be at other loops, and stops by the request's own exit. The row of a
finished or cancelled request goes to the next one in the queue. What a request gets does not depend
on the others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from looptx_core.generation.prompts import PREFILL_CHUNK, PromptChunk, split_prompt
from looptx_core.generation.request import Request, Step, next_tokens, score_prompts
from looptx_core.generation.running_batch import RunningBatch, StepOutput
from looptx_core.generation.speculative import draft_and_verify
from looptx_core.media.batch import batch_items, to_device

_ALONE = 1024
"""Tokens of prompts that are read before those who are ready go on, where nobody had to wait."""
_MOST_PIECES = 4
"""Pieces that are read between two tokens of those who go on, where as many times more wait."""


@dataclass(eq=False)
class _Prefill:
    """A request whose prompt is being read."""

    row: int
    request: Request
    pieces: deque[PromptChunk]

    @property
    def kind(self) -> tuple[int, int, int]:
        """Requests of the same kind can share a pass for their next pieces."""
        return *self.pieces[0][:2], self.request.prompt_exit.max_loops


class Scheduler:
    """Requests that join and leave while others run.

    Add requests, then call `step` until none is left; more may be added at any time. All rows of
    the batch's cache must be free at first.
    """

    def __init__(self, batch: RunningBatch) -> None:
        self.batch = batch
        self._waiting: deque[Request] = deque()
        self._free = deque(range(len(batch.cache.lengths)))
        self._owners: dict[int, Request] = {}
        self._prefills: list[_Prefill] = []
        self._drafting: list[int] = []
        # Rows in the core that have had no token since a piece was read.
        self._owed: set[int] = set()

    def __len__(self) -> int:
        """The requests that are not finished."""
        return len(self._waiting) + len(self._owners)

    @property
    def running(self) -> int:
        """The requests that have a row."""
        return len(self._owners)

    @property
    def waiting(self) -> Sequence[Request]:
        """The requests that have no row yet: nothing was done for them."""
        return self._waiting

    @property
    def tokens(self) -> int:
        """The tokens that the cache holds."""
        return sum(self.batch.cache.lengths)

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue."""
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Let a request end where it stands; nothing happens if it has ended."""
        if request in self._waiting:
            self._waiting.remove(request)
            return
        for row, owner in self._owners.items():
            if owner is request:
                self._release(row)
                return

    def step(self) -> list[Step]:
        """Read some of the prompts, and loop until a row's exit has to be checked.

        Returns the tokens that were drawn, in order. Where a request fails by itself and ends
        alone, its last step has the finish reason error.
        """
        while self._free and self._waiting:
            row, request = self._free.popleft(), self._waiting.popleft()
            self._owners[row] = request
            loops = max(request.exit.max_loops, request.prompt_exit.max_loops)
            self.batch.cache.deepest[row] = loops
            config = self.batch.backend.model.config
            pieces = deque(split_prompt(request.seen, request.media, config))
            self._prefills.append(_Prefill(row, request, pieces))
        steps = [] if self._owed else self._prefill()
        for row in list(self._drafting):
            try:
                drawn = list(draft_and_verify(self.batch, row, self._owners[row]))
            except Exception as error:  # raised again by _fail where a request isn't guarded
                steps += self._fail([row], error)
                continue
            steps += drawn
            if drawn[-1].finish_reason:
                self._release(row)
        if len(self.batch) and (output := self.batch.step()):
            steps += self._take(output)
        return steps

    def _prefill(self) -> list[Step]:
        """Read the next pieces of prompts, by arrival, those of a kind together.

        A stream waits for one piece, and for more only where several prompts wait for each stream:
        pieces that share a pass take less time than one by one.
        """
        steps: list[Step] = []
        streaming = self.batch.rows
        room, going = _ALONE, len(streaming) + len(self._drafting)
        if going:
            room = PREFILL_CHUNK * min(max(len(self._prefills) // going, 1), _MOST_PIECES)
        began = False
        while self._prefills and room > 0:
            first = self._prefills[0]
            length = first.pieces[0].end - first.pieces[0].start
            alike = [own for own in self._prefills if own.kind == first.kind]
            if going or room <= PREFILL_CHUNK:
                if began and length > room:
                    break
                alike = alike[: max(1, room // length)]
            room -= length * len(alike)
            began = True
            self._owed = set(streaming)
            try:
                output = self._run(alike)
            except Exception as error:  # likewise
                steps += self._fail([own.row for own in alike], error)
            else:
                steps += self._take(output)
        return steps

    def _run(self, alike: list[_Prefill]) -> StepOutput:
        """Run the next pieces of these; what the prompts predict that are finished by them."""
        device = self.batch.backend.device
        pieces = [own.pieces.popleft() for own in alike]
        start, end, _ = pieces[0]
        if start == 0:
            for own in alike:
                own.request.began = time.perf_counter()
        tokens = torch.tensor([own.request.seen[start:end] for own in alike], device=device)
        media = batch_items(item for piece in pieces for item in piece.items)
        output = self.batch.prompt(
            [own.row for own in alike],
            tokens,
            alike[0].request.prompt_exit.max_loops,
            to_device(media, device),
            every=any(own.request.score_prompt for own in alike),
        )
        if output.logits is not None:
            score_prompts([own.request for own in alike], output.logits, start)
        self._prefills = [own for own in self._prefills if own.pieces]
        return output.last.of([i for i, own in enumerate(alike) if not own.pieces])

    def _take(self, output: StepOutput) -> list[Step]:
        """Draw the next tokens of the rows that exited; these loop again, or become free."""
        if not output.rows:
            return []
        self._owed.difference_update(output.rows)
        owners = [self._owners[row] for row in output.rows]
        steps = next_tokens(owners, output)
        stay = []
        for row, owner, step in zip(output.rows, owners, steps):
            if step.finish_reason is not None:
                self._release(row)
            elif owner.options.speculate:
                self._drafting.append(row)
            else:
                stay.append(row)
        if stay:
            tokens = [self._owners[row].seen[-1] for row in stay]
            self.batch.add(stay, tokens, [self._owners[row].exit for row in stay])
        return steps

    def _fail(self, rows: Sequence[int], error: Exception) -> list[Step]:
        """End the requests of rows whose own pass failed; raise the error if one of them does not
        end alone."""
        owners = [self._owners[row] for row in rows]
        if not all(owner.ends_alone for owner in owners):
            raise error
        for row, owner in zip(rows, owners):
            owner.error = error
            self._release(row)
        return [owner.failure() for owner in owners]

    def _release(self, row: int) -> None:
        """Free the row of a request, wherever the request stands."""
        del self._owners[row]
        self._prefills = [own for own in self._prefills if own.row != row]
        self._drafting = [own for own in self._drafting if own != row]
        self._owed.discard(row)
        if row in self.batch.rows:
            self.batch.drop(row)
        self.batch.cache.reset_row(row)
        self._free.append(row)


def serve(batch: RunningBatch, requests: Iterable[Request]) -> Iterator[Step]:
    """Generate for all requests, on the rows of the batch's cache; all rows must be free.

    Yields the tokens in the order in which they are drawn.
    """
    scheduler = Scheduler(batch)
    for request in requests:
        scheduler.add(request)
    while len(scheduler):
        yield from scheduler.step()
