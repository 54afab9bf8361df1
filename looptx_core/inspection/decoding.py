"""Cache policies in real decoding of held-out texts, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from looptx_core.checkpoint.folder import LoadedModel
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.data.shards import Shards
from looptx_core.generation.engine import Engine
from looptx_core.inspection.texts import PROMPT, TEXT_TOKENS, held_out_pieces
from looptx_core.model.cache import POLICIES
from looptx_core.training.evaluate import evaluate_loops

_LEVEL = 1e-3  # a share of the loss, below which what is smaller or simpler is worth more
_POINTS = 5e-3  # of the accuracy, the same
_NEXT = 0.1  # of a loop, which deciding when to stop may cost

Document = dict[str, Any]


def decode_policies(
    loaded: LoadedModel, shards: Shards, settings: ExitSettings, tokens: int, fixed: int
) -> list[Document]:
    """Cache policies in real decoding of held-out texts, batch 1, with exits and at fixed depths.

    `loss_with_full_cache`, `accuracy_with_full_cache`: of the same texts at the same depths, had
    every token run all loops.
    `fixed`: the depth; None with exits. Among the depths is the next one below what the exit takes.
    """
    model, deepest = loaded.model, loaded.model.config.max_loops
    engine = Engine(model, loaded.tokenizer, settings)
    texts = held_out_pieces(shards, tokens, min(TEXT_TOKENS, model.config.max_seq_len))
    if not texts:
        return []
    seen = [evaluate_loops(model, text[None], deepest) for text in texts]

    def decode(policy: str, depth: int | None) -> Document:
        options = GenerationOptions(loops=depth or "auto", prompt_loops=deepest, kv_policy=policy)
        engine.score_forced(texts[0][None], PROMPT, options)  # graphs are recorded at first use
        walked = [engine.score_forced(text[None], PROMPT, options) for text in texts]
        losses, hits = (torch.cat([part[0] for part in w]) for w in zip(*(w[:2] for w in walked)))

        def exact(by_loop: Sequence[Tensor]) -> float:
            parts = (values[:, PROMPT - 1 :].gather(0, w.loops - 1)
                     for values, w in zip(by_loop, walked))  # fmt: skip
            return mean(torch.cat([part[0] for part in parts]))

        return {
            "policy": policy,
            "exit": settings.rule if depth is None else f"fixed at {depth}",
            "fixed": depth,
            "prompt_loops": deepest,
            "tokens": len(losses),
            "loss": mean(losses),
            "loss_with_full_cache": exact([part.token_loss for part in seen]),
            "accuracy": mean(hits),
            "accuracy_with_full_cache": exact([part.hit for part in seen]),
            "mean_loops": mean(torch.cat([w.loops[0, 1:] for w in walked])),
            "bytes_per_token": walked[0].bytes_per_token,
            "tokens_per_second": len(losses) / sum(w.seconds for w in walked),
        }

    found = []
    for policy in POLICIES:
        own = decode(policy, None)
        depths = sorted({_below(own), fixed, deepest})
        found += [own, *(decode(policy, depth) for depth in depths)]
    return found


def _below(own: Document) -> int:
    """The fixed depth that costs what an exit in real decoding does, at most `_NEXT` more."""
    return max(1, int(own["mean_loops"] + _NEXT))


def better_policy(found: list[Document]) -> str:
    """The cache policy to keep: the smaller `last` unless `fill` is clearly better with exits."""
    losses = {each["policy"]: each["loss"] for each in found if each["fixed"] is None}
    return "last" if losses["last"] <= losses["fill"] * (1 + _LEVEL) else "fill"


def as_good(found: list[Document], policy: str, tasks: list[Document]) -> Document | None:
    """What shows that the exit is not worth having, with this cache: a fixed depth at about
    the same cost or less that predicts texts as well, and answers as many lines; None where there
    is none.
    """
    rows = {each["fixed"]: each for each in found if each["policy"] == policy}
    own, simple = rows[None], rows[_below(rows[None])]
    answers = all(
        task["accuracy"] <= task["accuracy_by_loop"][simple["fixed"] - 1] + _POINTS
        for task in tasks
    )
    return simple if answers and simple["loss"] <= own["loss"] * (1 + _LEVEL) else None


def mean(values: Tensor) -> float:
    """The mean of values of any shape, summed in double precision."""
    return float(values.double().mean())
