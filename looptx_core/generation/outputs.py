"""Items of media that a model writes: which ids may follow, and when an item is finished."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from looptx_core.config.generation import GenerationOptions
from looptx_core.media.base import Writer


@dataclass(frozen=True)
class Output:
    """A finished item of a medium that a model has written."""

    medium: str
    ids: tuple[int, ...]
    """Its tokens, without the one that opens it."""
    content: bytes
    """The file's content."""
    elapsed: float = 0.0
    """Seconds that it took to make the file of the codes."""


class OpenItem(NamedTuple):
    """An item that is being written."""

    medium: str
    writer: Writer
    written: Sequence[int]

    def restrict(self, logits: Tensor) -> Tensor:
        """logits (vocab_size,), with minus infinity for ids that may not follow."""
        allowed = torch.tensor(list(self.writer.allowed(self.written)), device=logits.device)
        return torch.full_like(logits, float("-inf")).index_copy(0, allowed, logits[allowed])

    def finish(self, token: int, options: GenerationOptions) -> Output | None:
        """The finished item, if this token ends it."""
        ids = (*self.written, token)
        if not self.writer.finished(ids):
            return None
        began = time.perf_counter()
        content = self.writer.render(ids, options)
        return Output(self.medium, ids, content, time.perf_counter() - began)


def open_item(writers: Mapping[str, Writer], seen: Sequence[int]) -> OpenItem | None:
    """The item that is unfinished after these ids (a prompt and its continuation), if any."""
    for medium, writer in writers.items():
        codes = range(writer.first_code, writer.first_code + writer.codes)
        start = len(seen)
        while start and seen[start - 1] in codes:
            start -= 1
        if start and seen[start - 1] == writer.opens:
            written = seen[start:]
            if not (written and writer.finished(written)):
                return OpenItem(medium, writer, written)
    return None
