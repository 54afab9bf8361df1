"""How prompts are read: in pieces of a fixed length, so that no prompt holds up other requests.

What a model remembers may depend on where a prompt is cut (under the KV policy `last`, the shallow
loops of a piece see the deepest entries of the pieces before). So the length is fixed, and a prompt
is read in the same pieces alone, in a batch and by a server (chunked prefill).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from looptx_core.config.model import ModelConfig
from looptx_core.errors import DataError
from looptx_core.media.batch import MediaItem
from looptx_core.media.registry import MEDIA, media_for

PREFILL_CHUNK = 128
"""Tokens of a piece. A piece that would end within an item of a medium goes on to the item's end,
because tokens of an item may attend to each other both ways."""


class PromptChunk(NamedTuple):
    """The tokens `start` to `end` - 1 of a prompt, and the items that stand there."""

    start: int
    end: int
    items: tuple[MediaItem, ...] = ()


def split_prompt(
    tokens: Sequence[int],
    items: Sequence[MediaItem],
    config: ModelConfig,
    piece: int = PREFILL_CHUNK,
) -> list[PromptChunk]:
    """The pieces of a prompt, in order."""
    places = {MEDIA[name].token(config): name for name in {item.medium for item in items}}
    waiting: dict[str, deque[MediaItem]] = {name: deque() for name in places.values()}
    for item in items:
        waiting[item.medium].append(item)
    pieces, start = [], 0
    while start < len(tokens):
        end = min(start + piece, len(tokens))
        while end < len(tokens) and tokens[end] in places and tokens[end - 1] == tokens[end]:
            end += 1
        here: list[MediaItem] = []
        for token, name in places.items():
            left = sum(found == token for found in tokens[start:end])
            while left > 0 and waiting[name]:
                here.append(waiting[name].popleft())
                left -= here[-1].length
        pieces.append(PromptChunk(start, end, tuple(here)))
        start = end
    return pieces


def check_placeholders(
    tokens: Sequence[int], items: Sequence[MediaItem], config: ModelConfig, where: str
) -> None:
    """Raise `DataError` for a prompt with more or fewer placeholders than its items take.

    Prompts share passes, and a pass counts the placeholders of all of them: a prompt with a wrong
    number would harm the others.
    """
    for medium in media_for(config):
        token = medium.token(config)
        places = sum(found == token for found in tokens)
        needed = sum(item.length for item in items if item.medium == medium.name)
        if places != needed:
            raise DataError(
                f"{where} has the token {token} of {medium.plural} {places} times, and the "
                f"{medium.plural} that came with it take {needed}; leave the token out, or give "
                "the items that belong to it"
            )
