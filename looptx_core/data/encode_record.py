"""A record as tokens: its texts, and its items, which are read or written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from looptx_core.config.model import ModelConfig
from looptx_core.data.chat import ChatTemplate, encode_turns
from looptx_core.data.example import Example
from looptx_core.data.records import MediaFile, Record, Turn
from looptx_core.data.tokenizer import end_id, token_bytes
from looptx_core.errors import DataError
from looptx_core.media.base import Grid
from looptx_core.media.registry import MEDIA, media_for, writers


def encode_record(
    record: Record,
    tokenizer: Tokenizer,
    config: ModelConfig | None,
    all_count: bool = False,
    chat: ChatTemplate | None = None,
    end: int | None = None,
) -> Example:
    """A record as tokens, with each of its texts; the longest one comes first.

    Text n of a part goes with text n of the record's other parts, which go round. all_count:
    prompts count as well. chat: the template of a conversation without media; by default ours.
    end: the token that ends a response; by default the one that ends a document.

    Raises `DataError` for an item that can't be read, or of a medium that the model has not.
    """
    encoder = _Encoder(tokenizer, config, record, chat, end)
    parts = [part for turn in record.turns for part in turn.content]
    count = max((len(part) for part in parts if not isinstance(part, MediaFile)), default=1)
    ways = sorted(
        (encoder.example(way, all_count) for way in range(count)), key=lambda e: -len(e.ids)
    )
    return ways[0]._replace(others=tuple(ways[1:]))


class _Encoder:
    """Makes tokens of one record, whose items it measures once."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ModelConfig | None,
        record: Record,
        chat: ChatTemplate | None,
        end: int | None,
    ) -> None:
        self.tokenizer, self.config, self.record, self.chat = tokenizer, config, record, chat
        self.end = end_id(tokenizer) if end is None else end
        self.files = tuple(file for file in record.files if not file.written)
        self.placeholders: list[int] = []
        self.grids: list[Grid] = []
        self._codes: dict[Any, list[int]] = {}
        self.items = [self._item(file) for file in record.files if not file.written]

    def _written(self, file: MediaFile, before: Sequence[int]) -> list[int]:
        """The tokens of an item that is written after these; those that are not learned, as ~id."""
        medium, where = MEDIA[file.medium], self.record.where
        writer = writers(self.config).get(file.medium) if self.config else None
        if writer is None:
            raise DataError(f"{where}: this model writes no {medium.plural}; give another")
        name_of, transcript = self.tokenizer.id_to_token, writer.transcript(before)
        text = tuple((token, token_bytes(name_of(token) or "")) for token in transcript)
        key = file.path, text
        if key not in self._codes:
            self._codes[key] = writer.encode(file.path, f"{where}: {file.path}", text)
        ids = self._codes[key]
        return [writer.opens, *(token if writer.learned(token) else ~token for token in ids)]

    def _item(self, file: MediaFile) -> list[int]:
        """The placeholders of an item that is read."""
        medium, where = MEDIA[file.medium], self.record.where
        name = f"{where}: {file.path}"
        if self.config is None or medium not in media_for(self.config):
            raise DataError(
                f"{where}: has a {medium.noun}, and this model reads none; give one by `model` "
                f"that was trained on {medium.plural}"
            )
        grid = medium.measure(file.path, self.config, name)
        self.grids.append(grid)
        self.placeholders.append(medium.token(self.config))
        return self.placeholders[-1:] * medium.length(grid)

    def example(self, way: int, all_count: bool) -> Example:
        """With text `way` of each part."""
        if self.record.form == "messages" and self.chat is not None and not self.record.files:
            ids, counted = self.chat.turns(self._messages(way), self.tokenizer, self.record.where)
            learned = np.ones(len(ids), bool) if all_count else np.array(counted)
            return Example(np.array(ids, np.int32), learned, (), (), self.record.group, (), None)
        end, items = end_id(self.tokenizer), iter(self.items)
        turns: list[list[int]] = []
        for turn in self.record.turns:
            turns.append(self._content(turn, way, items, [*chain(*turns)]))
        if self.record.form == "messages":
            roles = [turn.role for turn in self.record.turns]
            ids, counted = encode_turns(zip(roles, turns), self.tokenizer)
        elif self.record.form == "prompt":
            before, after = turns
            if self.record.files or not before:
                before = [end, *before]  # as generation begins
            ids = [*before, *after, self.end]
            opens = isinstance(self.record.turns[1].content[0], MediaFile)  # as who asks for it
            counted = [False] * (len(before) + opens) + [True] * (len(after) + 1 - opens)
        else:
            ids = [end, *turns[0], end]
            # The end before a text is the end of another text; an item has none before it.
            counted = [not self.files] + [True] * (len(ids) - 1)
        tokens = np.array(ids, np.int32)
        learned = np.ones(len(ids), bool) if all_count else np.array(counted)
        learned &= ~np.isin(tokens, self.placeholders) & (tokens >= 0)
        tokens = np.where(tokens < 0, ~tokens, tokens)
        return Example(
            tokens, learned, self.files, (), self.record.group, tuple(self.grids), self._label(way)
        )

    def _messages(self, way: int) -> list[dict[str, str]]:
        """With text `way` of each part."""
        return [
            {
                "role": turn.role,
                "content": "".join(str(part[way % len(part)]) for part in turn.content),
            }
            for turn in self.record.turns
        ]

    def _label(self, way: int) -> str | None:
        match self.record.turns[0].content:
            case (MediaFile(medium, _, False), tuple() as texts) if (
                self.record.form == "text" and MEDIA[medium].labelled
            ):
                return str(texts[way % len(texts)])
        return None

    def _content(
        self, turn: Turn, way: int, items: Iterator[list[int]], before: Sequence[int]
    ) -> list[int]:
        """before: the tokens of the record's turns before this one."""
        ids: list[int] = []
        for part in turn.content:
            if isinstance(part, MediaFile):
                ids += self._written(part, [*before, *ids]) if part.written else next(items)
            else:
                text = part[way % len(part)]
                ids += self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids
