"""Self-speculation: shallow loops draft tokens, full depth verifies them in one pass.

A state after t loops does not depend on how many follow. So a drafted position keeps the states
and the cache entries of its shallow loops, and verification continues all drafted positions from
there in one pass: no loop is run twice. With p and q the probabilities of the drafted token at full
depth and in the draft, the token is accepted with probability p / q; otherwise one is drawn from
the normalised positive part of p - q (arXiv 2211.17192). The tokens are then distributed as at full
depth, and greedy tokens are the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from looptx_core.generation.request import Request, Step, at_least_float, record
from looptx_core.generation.running_batch import RunningBatch, StepOutput
from looptx_core.generation.sampling import pick
from looptx_core.stopping.resolve import draft_loops


def draft_and_verify(batch: RunningBatch, row: int, request: Request) -> Iterator[Step]:
    """Draft some tokens, verify them, and take the accepted ones and one more of full depth.

    row: the request's in the batch's cache; the prompt and its first token are done.
    """
    backend, cache, counters = batch.backend, batch.cache, batch.counters
    rows = [row]
    shallow, full = draft_loops(request.options, request.exit), request.exit.max_loops
    # The last token needs no draft, and no more are drafted than the request may still take.
    drafts = min(request.options.speculate, request.limit - len(request.seen) - 1)
    states, starts, drafted, proposed = [], [], [], []
    seen = list(request.seen)
    for number in range(drafts + 1):
        run = backend.begin(cache, rows)
        embedding = run.embed(torch.tensor([seen[-1:]], device=backend.device))
        state = run.iterate(embedding, embedding, [1], shallow)
        states.append(state)
        starts.append(embedding)
        if number < drafts:
            logits = at_least_float(run.draft_logits(state)[0, 0])
            proposed.append(request.chances(logits, seen))
            drafted.append(pick(proposed[-1], request.generator))
            seen.append(drafted[-1])
        cache.advance(rows)
    cache.truncate(drafts + 1, rows)
    count = drafts + 1
    run = backend.begin(cache, rows, count)
    state, embedding = torch.cat(states, 1), torch.cat(starts, 1)
    if shallow < full:
        state = run.iterate(state, embedding, [shallow + 1], full - shallow)
    logits = at_least_float(run.logits(state)[0])
    counters.embedded += count
    counters.loops += count * full
    counters.readouts += drafts + count
    counters.exit_checks += count
    counters.drafted += drafts
    outputs = run.confidence(state.transpose(0, 1), [full] * count)
    cache.view(count, rows).advance()
    for number in range(count):
        target = request.chances(logits[number], request.seen)
        if number < drafts:
            accepted, token = settle(drafted[number], target, proposed[number], request.generator)
        else:
            accepted, token = False, pick(target, request.generator)
        counters.accepted += accepted
        output = StepOutput(rows, logits[number : number + 1], [full], [outputs[number][0]])
        yield from record([request], [token], output)
        if not accepted or request.done:
            cache.truncate(drafts - number, rows)
            return


def settle(
    draft: int, target: Tensor, proposed: Tensor, generator: torch.Generator
) -> tuple[bool, int]:
    """Accept or replace a drafted token: returns (whether it is accepted, the token to take).

    target, proposed: (vocab,), each token's probability at full depth and in the draft. The token
    to take is distributed as `target`, whatever was proposed.
    """
    share = float(target[draft] / proposed[draft])
    if share >= 1 or float(torch.rand((), generator=generator)) < share:
        return True, draft
    residual = (target - proposed).clamp(min=0)
    return False, pick(residual / residual.sum(), generator)
