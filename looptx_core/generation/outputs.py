"""Items of media that a model writes: which ids may follow, and when an item is finished."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from looptx_core.config.generation import GenerationOptions
from looptx_core.media.writer import Writer


@dataclass(frozen=True)
class Output:
    """A finished item of a medium that a model has written."""

    medium: str
    ids: tuple[int, ...]
    """Its tokens, without the one that opens it."""
    codes: range
    """Which of them are codes."""
    content: bytes
    """The file's content."""
    seconds: float | None = None
    """How long it is, where its medium has time."""
    elapsed: float = 0.0
    """Seconds that it took to make the file of the codes."""


class OpenItem(NamedTuple):
    """An item that is being written."""

    medium: str
    writer: Writer
    written: Sequence[int]
    transcript: Sequence[int]
    """The text that it says, see `Writer.transcript`."""

    def restrict(self, logits: Tensor) -> Tensor:
        """logits (vocab_size,), with minus infinity for ids that may not follow."""
        ids = list(self.writer.allowed(self.written, self.transcript))
        allowed = torch.tensor(ids, device=logits.device)
        return torch.full_like(logits, float("-inf")).index_copy(0, allowed, logits[allowed])

    def finish(self, token: int, options: GenerationOptions) -> Output | None:
        """The finished item, if this token ends it."""
        ids, writer = (*self.written, token), self.writer
        if not writer.finished(ids, self.transcript):
            return None
        began = time.perf_counter()
        content = writer.render(ids, options)
        elapsed = time.perf_counter() - began
        return Output(self.medium, ids, writer.code_ids, content, writer.seconds(ids), elapsed)


def open_item(writers: Mapping[str, Writer], seen: Sequence[int]) -> OpenItem | None:
    """The item that is unfinished after these ids (a prompt and its continuation), if any."""
    for medium, writer in writers.items():
        if (start := _last(seen, writer.opens)) is not None:
            written, transcript = seen[start + 1 :], writer.transcript(seen[:start])
            if writer.is_open(written, transcript):
                return OpenItem(medium, writer, written, transcript)
    return None


def _last(ids: Sequence[int], wanted: int) -> int | None:
    """The last place of an id."""
    turned = ids[::-1]
    return len(ids) - 1 - turned.index(wanted) if wanted in turned else None
