"""Text with items of media in it, as the ids that a model reads: one rule for data and prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from tokenizers import Tokenizer

from looptx_core.config.model import ModelConfig
from looptx_core.errors import UsageError
from looptx_core.media.registry import MEDIA


class Item(Protocol):
    """A decoded item, or a file that will be one."""

    @property
    def medium(self) -> str: ...


class Decoded(Item, Protocol):
    @property
    def length(self) -> int:
        """The tokens that it takes."""


T = TypeVar("T", bound=Item)


def insert_items(text: str, items: Sequence[T]) -> list[str | T]:
    """A text and its items in their order.

    An item stands where its medium's marker is written. Items of a medium whose marker is not
    written come first. Markers of media without items are just characters.

    Raises `UsageError` where a text has another number of markers than items.
    """
    if not items:
        return [text]
    waiting: dict[str, list[T]] = {}
    for item in items:
        waiting.setdefault(item.medium, []).append(item)
    markers = {MEDIA[name].marker: name for name in waiting}
    for marker, name in markers.items():
        written, given = text.count(marker), len(waiting[name])
        if written not in (0, given):
            raise UsageError(
                f"{written} {marker} in a text for {given} {MEDIA[name].plural}; write it once a "
                f"{MEDIA[name].noun}, or leave all out and the {MEDIA[name].plural} come first"
            )
    placed: list[str | T] = [item for item in items if MEDIA[item.medium].marker not in text]
    for part in re.split(f"({'|'.join(map(re.escape, markers))})", text):
        placed.append(waiting[markers[part]].pop(0) if part in markers else part)
    return placed


def encode_parts(
    parts: Iterable[str | T],
    tokenizer: Tokenizer,
    config: ModelConfig | None,
    length: Callable[[T], int],
) -> Iterator[tuple[list[int], bool]]:
    """The ids of each part, and whether it is text. length: the tokens that an item takes."""
    for part in parts:
        if isinstance(part, str):
            yield tokenizer.encode(part, add_special_tokens=False).ids, True
        else:
            assert config is not None, "items come with the configuration of their reader"
            yield [MEDIA[part.medium].token(config)] * length(part), False


def content_ids(
    text: str,
    tokenizer: Tokenizer,
    items: Sequence[Decoded] = (),
    config: ModelConfig | None = None,
) -> list[int]:
    """The ids of a text with its items placed; arguments and errors as for `insert_items`."""
    parts = encode_parts(insert_items(text, items), tokenizer, config, lambda item: item.length)
    return [token for ids, _ in parts for token in ids]
