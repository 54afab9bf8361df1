"""Long recordings, heard piece after piece: what was said from when to when."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.engine import Engine
from looptx_core.generation.request import Generation, MediaPrompt
from looptx_core.media.base import Source
from looptx_core.media.registry import MEDIA

_AT_ONCE = 8  # pieces in memory
_REPEATED = 4  # the most words that two pieces may both have


class Segment(NamedTuple):
    """A stretch of a recording or of a clip."""

    start: float
    """Seconds from the beginning."""
    end: float
    text: str
    """What is said there, without the words that the stretch before has already; of a clip, what
    happens up to its end."""
    generation: Generation

    def to_dict(self) -> dict[str, Any]:
        """JSON values, as `looptx generate` prints them."""
        return {"start": round(self.start, 2), "end": round(self.end, 2), "text": self.text}


def transcribe(
    engine: Engine,
    source: Source,
    options: GenerationOptions | None = None,
    *,
    medium: str = "audio",
    where: str | None = None,
) -> Iterator[Segment]:
    """What is said in a recording of any length, in order, as it is heard.

    Pieces overlap a little, so that a word at a cut is whole in one of them. A few pieces are in
    memory at a time. where: what errors call the source.

    Raises `DataError` for a recording that can't be read, `UsageError` for a model that can't hear.
    """
    pieces = MEDIA[medium].pieces(source, engine.model.config, where)
    said: list[str] = []
    while group := list(itertools.islice(pieces, _AT_ONCE)):
        prompts = [MediaPrompt("", (piece.item,)) for piece in group]
        for piece, generation in zip(group, engine.complete(prompts, options)):
            words = generation.text.split()
            words = words[_repeated(said, words) :]
            said = (said + words)[-_REPEATED:]
            yield Segment(piece.start, piece.end, " ".join(words), generation)


def joined(segments: list[Segment]) -> Generation:
    """The generations of all segments as one."""
    each = [segment.generation for segment in segments]
    tokens = [step for generation in each for step in generation.tokens]
    tokens[-1] = tokens[-1]._replace(seconds=sum(g.tokens[-1].seconds for g in each))
    return replace(
        each[-1],
        text="".join(generation.text for generation in each),
        tokens=tokens,
        prompt_tokens=sum(generation.prompt_tokens for generation in each),
    )


def _repeated(before: list[str], after: list[str]) -> int:
    """How many words at the start of a piece are the last ones of the piece before."""
    plain = [[re.sub(r"\W", "", word).lower() for word in words] for words in (before, after)]
    for count in range(min(_REPEATED, *map(len, plain)), 0, -1):
        if plain[0][-count:] == plain[1][:count]:
            return count
    return 0
