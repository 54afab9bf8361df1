"""Continuous batching over requests and over depth.

A request joins as soon as a row of the cache is free: its prompt has a pass of its own. Then each
of its tokens loops with whatever other rows are in the core, at whatever loops, and leaves by its
own exit. A finished request's row goes to the next one that waits.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator

import torch

from looptx_core.generation.flight import Flight, Landing
from looptx_core.generation.request import Request, Step, advance
from looptx_core.media.batch import batch_items, to_device


def serve(flight: Flight, requests: Iterable[Request]) -> Iterator[Step]:
    """Generate for all requests on the rows of the flight's cache, which are free."""
    waiting = deque(requests)
    free = deque(range(len(flight.cache.lengths)))
    riding: dict[int, Request] = {}

    def go_on(landing: Landing) -> Iterator[Step]:
        owners = [riding[row] for row in landing.rows]
        steps = advance(owners, landing)
        stay = []
        for row, step in zip(landing.rows, steps):
            if step.finish_reason is None:
                stay.append(row)
            else:
                del riding[row]
                flight.cache.clear(row)
                free.append(row)
        if stay:
            tokens = [riding[row].seen[-1] for row in stay]
            flight.enter(stay, tokens, [riding[row].exit for row in stay])
        yield from steps

    while waiting or len(flight):
        joining = {free.popleft(): waiting.popleft() for _ in range(min(len(free), len(waiting)))}
        riding |= joining
        for rows in _alike(joining):
            yield from go_on(prompt_of(flight, rows, [joining[row] for row in rows]))
        if len(flight) and (landing := flight.turn()):
            yield from go_on(landing)


def _alike(joining: dict[int, Request]) -> list[list[int]]:
    """Rows whose prompts can share a pass: of one length, to one depth."""

    def kind(row: int) -> tuple[int, int]:
        return len(joining[row].seen), joining[row].prompt_exit.max_loops

    return [list(rows) for _, rows in itertools.groupby(sorted(joining, key=kind), kind)]


def prompt_of(flight: Flight, rows: list[int], requests: list[Request]) -> Landing:
    """The pass of prompts that are alike, each on its row."""
    for request in requests:
        request.began = time.perf_counter()
    tokens = torch.tensor([request.seen for request in requests], device=flight.moves.device)
    media = batch_items(item for request in requests for item in request.media)
    loops = requests[0].prompt_exit.max_loops
    return flight.prompt(rows, tokens, loops, to_device(media, flight.moves.device))
