"""One text, token by token: its depth, what every loop would have said, and what moved it."""

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
    """JSON values: `tokens`, one for each position and what it predicts, and `deletion`.

    A position has `text` (its own), `next` (the token that follows, if one does), `loops` and
    `confidence` where the stored exit lets it go, `signals` (by name, after each loop, what the
    exit rules look at; None where there is no number), `top` (for each loop the likeliest tokens
    with their probabilities), `flips` (loops after which the answer was another than before) and
    `influences` (earlier positions with their shares in the answer at the exit).
    """
    tokens = tokens[:MOST_TOKENS]
    ids = torch.tensor(tokens, device=model.embedding.weight.device)
    logits, depths, confidences, signals = _walk(model, ids, settings, loops)
    shares = influence(model, ids, depths)
    likeliest = logits.softmax(-1).topk(min(TOP, logits.shape[-1]))
    texts = [_shown(tokenizer, token) for token in tokens]
    records = []
    for place in range(len(tokens)):
        answers = likeliest.indices[:, place, 0]
        flips = (1 + (answers[1:] != answers[:-1]).nonzero()[:, 0] + 1).tolist()
        strongest = shares[place, :place].topk(min(_SHOWN_INFLUENCES, place))
        records.append(
            {
                "text": texts[place],
                "next": texts[place + 1] if place + 1 < len(tokens) else None,
                "loops": int(depths[place]),
                "confidence": round(float(confidences[place]), 4),
                "top": [
                    [
                        [_shown(tokenizer, int(token)), round(float(probability), 4)]
                        for token, probability in zip(*at_loop)
                    ]
                    for at_loop in zip(likeliest.indices[:, place], likeliest.values[:, place])
                ],
                "signals": {
                    name: [_number(value) for value in values[:, place].tolist()]
                    for name, values in signals.items()
                },
                "flips": flips,
                "influences": [
                    [int(where), round(float(value), 4)]
                    for value, where in zip(strongest.values, strongest.indices)
                ],
            }
        )
    test = deletion_test(model, ids, shares, depths, seed=seed)
    return {"tokens": records, "deletion": None if test is None else vars(test)}


@torch.no_grad()
def _walk(
    model: LoopedTransformer, tokens: Tensor, settings: ExitSettings, loops: int
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """All logits (loops, length, vocab_size); depth and confidence by the stored rule, (length,);
    every rule's signals by name, each (loops, length).

    From states of full depth: a token that left early still shows its deeper ones.
    """
    own = Exit(min(settings.min_loops, loops), loops, settings, settings.rule)
    ctx = model.context(len(tokens))
    depth = torch.zeros(len(tokens), dtype=torch.long)
    confidence = torch.zeros(len(tokens))
    logits: list[Tensor] = []
    seen: list[dict[str, Tensor]] = []
    before = embedding = model.embed(tokens[None], ctx)
    for loop, state in model.iterate(embedding, embedding, ctx, range(1, loops + 1)):
        judged, change = model.confidence(state, loop), relative_change(before, state)
        before = state
        logit, gain, moved = (part[0].float().cpu() for part in (*judged, change))
        read = calibrated(logit, gain, moved, loop, settings)
        previous = logits[-1] if logits else None
        logits.append(model.head(model.coda_hidden(state, ctx))[0].float().cpu())
        signals = ExitSignals(*read, logits[-1], previous)
        seen.append({n: torch.as_tensor(s.value(signals)) for n, s in SIGNALS.items()})
        here = (depth == 0) & own.stops(loop, signals)
        sharp = top_log_odds(logits[-1].log_softmax(-1))
        told = reported_confidence(logit, sharp, settings)
        depth[here], confidence[here] = loop, told[here]
    by_name = {name: torch.stack([values[name] for values in seen]) for name in SIGNALS}
    return torch.stack(logits), depth, confidence, by_name


def _number(value: float) -> float | None:
    """For JSON, which has no infinity: a divergence from no loop before."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; a row without a token has none."""
    if token >= tokenizer.get_vocab_size():
        return ""
    return tokenizer.decode([token], skip_special_tokens=False)
