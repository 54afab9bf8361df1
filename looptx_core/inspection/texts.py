"""The texts that an inspection decodes and traces: held-out ones, or what was asked for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from looptx_core.checkpoint.folder import LoadedModel
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.inspection import InspectConfig
from looptx_core.data.shards import Shards
from looptx_core.data.tokenizer import end_id, opening_ids
from looptx_core.errors import UsageError
from looptx_core.generation.engine import Engine

TEXT_TOKENS = 128
"""Of one held-out text, prompt included."""
PROMPT = 16
"""Tokens of a text that are its prompt."""


def held_out_pieces(shards: Shards, wanted: int, length: int) -> list[Tensor]:
    """Pieces of held-out documents, spread over the split, with about so many tokens after their
    prompts; each (length,) or, where a document ends, shorter."""
    if length <= PROMPT + 1:
        return []
    end = end_id(shards.tokenizer)
    tokens = shards.tokens("val")
    stream = torch.from_numpy(tokens.read(0, len(tokens)))
    starts = torch.cat([torch.zeros(1, dtype=torch.long), (stream == end).nonzero()[:, 0] + 1])
    found: dict[int, Tensor] = {}
    places = torch.linspace(0, len(stream) - 1, max(4, 4 * wanted // (length - PROMPT)))
    for place in places.long().tolist():
        document = int(torch.searchsorted(starts, place, right=True)) - 1
        begin = int(starts[document])
        begin += (place - begin) // length * length
        stop = int(starts[document + 1]) if document + 1 < len(starts) else len(stream)
        text = stream[begin : min(begin + length, stop)]
        if len(text) > PROMPT + 1:  # the first of them is the prompt's
            found.setdefault(begin, text)
    there = sum(len(text) - PROMPT for text in found.values())
    return list(found.values())[:: max(1, math.ceil(there / wanted))]


def sample(loaded: LoadedModel, shards: Shards) -> list[int]:
    """A held-out passage to trace where no text was given; may be empty."""
    pieces = held_out_pieces(shards, TEXT_TOKENS, min(TEXT_TOKENS, loaded.config.max_seq_len))
    return max(pieces, key=len).tolist() if pieces else []


def asked_text(loaded: LoadedModel, settings: ExitSettings, config: InspectConfig) -> list[int]:
    """The tokens to trace, a prompt with its greedy continuation."""
    text = config.text if config.text is not None else config.prompt
    assert text is not None
    ids = loaded.tokenizer.encode(text, add_special_tokens=False).ids
    tokens = [*opening_ids(loaded.tokenizer), *ids]
    if config.prompt is not None:
        options = GenerationOptions(temperature=0, max_new_tokens=config.max_new_tokens)
        engine = Engine(loaded.model, loaded.tokenizer, settings, ends=loaded.special.ends)
        tokens = tokens + [step.id for step in engine.generate([tokens], options)]
    if len(tokens) < 2:
        raise UsageError("`text`: has fewer than two tokens; give a longer one")
    return tokens[: loaded.model.config.max_seq_len]
