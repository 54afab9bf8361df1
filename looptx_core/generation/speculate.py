"""Self-speculation: shallow loops draft tokens, full depth verifies them in one pass.

A state after t loops does not depend on how many follow. So a drafted position keeps the states
and the cache entries of its shallow loops, and verification takes all drafted positions on from
there, side by side: no loop is run twice. What a position says at full depth decides: a draft is
accepted with the chance p / q of its token under full depth and under the draft, else the token is
drawn from what p has beyond q (arXiv 2211.17192). So tokens come as full depth would draw them,
and the greedy ones are the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from looptx_core.generation.exits import draft_loops
from looptx_core.generation.flight import Flight, Landing
from looptx_core.generation.request import Request, Step, advance, at_least_float, record
from looptx_core.generation.sampling import pick
from looptx_core.generation.scheduler import prompt_of

_ROW = [0]


def speculate(flight: Flight, request: Request) -> Iterator[Step]:
    """Generate for one request on the only row of the flight's cache, which is empty."""
    yield from advance([request], prompt_of(flight, _ROW, [request]))
    while not request.done:
        yield from _round(flight, request)
    flight.cache.clear(0)


def _round(flight: Flight, request: Request) -> Iterator[Step]:
    """Draft some tokens, verify them, take those that stand and one that full depth draws."""
    moves, cache, work, exits = flight.moves, flight.cache, flight.work, request.exit
    shallow, full = draft_loops(request.options, exits), exits.max_loops
    # The last position's token needs no draft, and no more tokens than may come.
    drafts = min(request.options.speculate, request.limit - len(request.seen) - 1)
    states, starts, drafted, believed = [], [], [], []
    seen = list(request.seen)
    for number in range(drafts + 1):
        place = moves.at(cache, _ROW)
        state = embedding = moves.encode(torch.tensor([seen[-1:]], device=moves.device), place)
        state = moves.step(state, embedding, [1], place, further=shallow - 1)
        states.append(state)
        starts.append(embedding)
        if number < drafts:
            logits = at_least_float(moves.draft(state, place)[0, 0])
            believed.append(request.chances(logits, seen))
            drafted.append(pick(believed[-1], request.generator))
            seen.append(drafted[-1])
        cache.grow(_ROW)
    cache.forget(drafts + 1, _ROW)
    count = drafts + 1
    place = moves.at(cache, _ROW, count)
    state, embedding = torch.cat(states, 1), torch.cat(starts, 1)
    if shallow < full:
        state = moves.step(state, embedding, [shallow + 1], place, further=full - shallow - 1)
    logits = at_least_float(moves.decode(state, place)[0])
    work.encoded += count
    work.loops += count * full
    work.readouts += drafts + count
    work.judged += count
    work.drafted += drafts
    judged = moves.judge(state.transpose(0, 1), [full] * count)
    cache.window(count, _ROW).advance()
    for number in range(count):
        meant = request.chances(logits[number], request.seen)
        if number < drafts:
            stands, token = settle(drafted[number], meant, believed[number], request.generator)
        else:
            stands, token = False, pick(meant, request.generator)
        work.accepted += stands
        landing = Landing(_ROW, logits[number : number + 1], [full], [judged[number][0]])
        yield from record([request], [token], landing)
        if not stands or request.done:
            cache.forget(drafts - number, _ROW)
            return


def settle(
    draft: int, meant: Tensor, believed: Tensor, generator: torch.Generator
) -> tuple[bool, int]:
    """(whether the draft stands, the token that is taken).

    meant, believed: (vocab,), the chances of each token at full depth and in the draft. The token
    that is taken has the chances `meant`, whatever was believed.
    """
    share = float(meant[draft] / believed[draft])
    if share >= 1 or float(torch.rand((), generator=generator)) < share:
        return True, draft
    beyond = (meant - believed).clamp(min=0)
    return False, pick(beyond / beyond.sum(), generator)
