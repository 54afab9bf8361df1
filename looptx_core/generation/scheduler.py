"""Continuous batching over requests and over depth.

A request starts as soon as a row of the cache is free. Its prompt runs in a pass that it may share
with prompts of the same length. After that, each of its tokens loops beside the other active rows,
which may be at other loops, and stops by the request's own exit. The row of a finished request goes
to the next one in the queue.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator

import torch

from looptx_core.generation.request import Request, Step, next_tokens
from looptx_core.generation.running_batch import RunningBatch, StepOutput
from looptx_core.media.batch import batch_items, to_device


def serve(batch: RunningBatch, requests: Iterable[Request]) -> Iterator[Step]:
    """Generate for all requests, on the rows of the batch's cache; all rows must be free.

    Yields the tokens in the order in which they are drawn.
    """
    waiting = deque(requests)
    free = deque(range(len(batch.cache.lengths)))
    running: dict[int, Request] = {}

    def take(output: StepOutput) -> Iterator[Step]:
        """Draw the next tokens of the rows that exited; these loop again, or become free."""
        owners = [running[row] for row in output.rows]
        steps = next_tokens(owners, output)
        stay = []
        for row, step in zip(output.rows, steps):
            if step.finish_reason is None:
                stay.append(row)
            else:
                del running[row]
                batch.cache.reset_row(row)
                free.append(row)
        if stay:
            tokens = [running[row].seen[-1] for row in stay]
            batch.add(stay, tokens, [running[row].exit for row in stay])
        yield from steps

    while waiting or len(batch):
        joining = {free.popleft(): waiting.popleft() for _ in range(min(len(free), len(waiting)))}
        running |= joining
        for rows in _alike(joining):
            yield from take(run_prompts(batch, rows, [joining[row] for row in rows]))
        if len(batch) and (output := batch.step()):
            yield from take(output)


def _alike(joining: dict[int, Request]) -> list[list[int]]:
    """Groups of rows whose prompts can share a pass: the same length and the same depth."""

    def kind(row: int) -> tuple[int, int]:
        return len(joining[row].seen), joining[row].prompt_exit.max_loops

    return [list(rows) for _, rows in itertools.groupby(sorted(joining, key=kind), kind)]


def run_prompts(batch: RunningBatch, rows: list[int], requests: list[Request]) -> StepOutput:
    """Run the prompts of requests that can share a pass, each on its row."""
    for request in requests:
        request.began = time.perf_counter()
    device = batch.backend.device
    tokens = torch.tensor([request.seen for request in requests], device=device)
    media = batch_items(item for request in requests for item in request.media)
    loops = requests[0].prompt_exit.max_loops
    return batch.prompt(rows, tokens, loops, to_device(media, device))
