"""One text, token by token: its depth, every loop's prediction, and the tokens that moved it."""

from __future__ import annotations

import math
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from looptx_core.config.generation import ExitSettings
from looptx_core.inspection.influence import deletion_test, influence
from looptx_core.model.confidence import relative_change, top_log_odds
from looptx_core.model.loop import LoopedTransformer
from looptx_core.stopping.calibration import calibrated, reported_confidence
from looptx_core.stopping.rule import SIGNALS, Exit, ExitSignals

TOP = 5
MOST_TOKENS = 256
_SHOWN_INFLUENCES = 8


def trace_text(
    model: LoopedTransformer,
    tokenizer: Tokenizer,
    tokens: list[int],
    settings: ExitSettings,
    loops: int,
    seed: int = 0,
) -> dict[str, Any]:
    """JSON values: `tokens`, a record for each position and its prediction, and `deletion`.

    A record has `text` (of its own token), `next` (the following token, if any), `loops` and
    `confidence` (at the exit by the stored settings), `signals` (of the exit rules, by name, after
    each loop; None where there is no number), `top` (for each loop the most likely tokens with
    their probabilities), `flips` (loops that changed the top token) and `influences` (earlier
    positions with their shares in the prediction at the exit). `deletion` is a `DeletionTest`. A
    model with a memory has no influences and no deletion.
    """
    tokens = tokens[:MOST_TOKENS]
    ids = torch.tensor(tokens, device=model.embedding.weight.device)
    logits, depths, confidences, signals = _run_all_loops(model, ids, settings, loops)
    # What came through a memory leaves no attention to follow.
    follows = not model.config.has_memory
    shares = influence(model, ids, depths) if follows else torch.zeros(len(ids), len(ids))
    likeliest = logits.softmax(-1).topk(min(TOP, logits.shape[-1]))
    texts = [_shown(tokenizer, token) for token in tokens]
    records = []
    for position in range(len(tokens)):
        answers = likeliest.indices[:, position, 0]
        flips = (1 + (answers[1:] != answers[:-1]).nonzero()[:, 0] + 1).tolist()
        strongest = shares[position, :position].topk(min(_SHOWN_INFLUENCES, position))
        records.append(
            {
                "text": texts[position],
                "next": texts[position + 1] if position + 1 < len(tokens) else None,
                "loops": int(depths[position]),
                "confidence": round(float(confidences[position]), 4),
                "top": [
                    [
                        [_shown(tokenizer, int(token)), round(float(probability), 4)]
                        for token, probability in zip(*at_loop)
                    ]
                    for at_loop in zip(
                        likeliest.indices[:, position], likeliest.values[:, position]
                    )
                ],
                "signals": {
                    name: [_number(value) for value in values[:, position].tolist()]
                    for name, values in signals.items()
                },
                "flips": flips,
                "influences": [
                    [int(source), round(float(share), 4)]
                    for share, source in zip(strongest.values, strongest.indices)
                    if follows
                ],
            }
        )
    test = deletion_test(model, ids, shares, depths, seed=seed) if follows else None
    return {"tokens": records, "deletion": None if test is None else vars(test)}


@torch.no_grad()
def _run_all_loops(
    model: LoopedTransformer, tokens: Tensor, settings: ExitSettings, loops: int
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Run all loops for every token, also those after its exit.

    Returns the logits, (loops, length, vocab_size); depth and reported confidence at the exit by
    the stored rule, each (length,); and every signal by name, (loops, length).
    """
    own = Exit(min(settings.min_loops, loops), loops, settings, settings.rule)
    ctx = model.context(len(tokens))
    depth = torch.zeros(len(tokens), dtype=torch.long)
    confidence = torch.zeros(len(tokens))
    logits: list[Tensor] = []
    by_loop: list[dict[str, Tensor]] = []
    embedding = model.embed(tokens[None], ctx)
    before = model.injection.open(embedding)
    for loop, state in model.iterate(embedding, embedding, ctx, range(1, loops + 1)):
        output = (*model.confidence(state, loop), relative_change(before, state))
        before = state
        logit, gain, change = (part[0].float().cpu() for part in output)
        previous = logits[-1] if logits else None
        logits.append(model.head(model.coda_hidden(state, ctx))[0].float().cpu())
        calibrated_output = calibrated(logit, gain, change, loop, settings)
        signals = ExitSignals(*calibrated_output, logits[-1], previous)
        by_loop.append({n: torch.as_tensor(s.value(signals)) for n, s in SIGNALS.items()})
        exits = (depth == 0) & own.stops(loop, signals)
        top_odds = top_log_odds(logits[-1].log_softmax(-1))
        reported = reported_confidence(logit, top_odds, settings)
        depth[exits], confidence[exits] = loop, reported[exits]
    by_name = {name: torch.stack([values[name] for values in by_loop]) for name in SIGNALS}
    return torch.stack(logits), depth, confidence, by_name


def _number(value: float) -> float | None:
    """A number for JSON, which has no infinity; the first loop's divergence is infinite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; '' for padding of the vocabulary."""
    if token >= tokenizer.get_vocab_size():
        return ""
    return tokenizer.decode([token], skip_special_tokens=False)
