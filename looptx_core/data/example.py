"""A record as tokens, with the items of media that it reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from looptx_core.config.model import ModelConfig
from looptx_core.data.records import MediaFile
from looptx_core.media.base import Grid
from looptx_core.media.batch import MediaItem
from looptx_core.media.registry import MEDIA


class Example(NamedTuple):
    """ids: (tokens,) int32. counted: (tokens,) bool, the tokens to learn."""

    ids: np.ndarray
    counted: np.ndarray
    files: tuple[MediaFile, ...] = ()
    """The items that are read, in the order of their placeholder tokens."""
    others: tuple[Example, ...] = ()
    """The same record with its other texts, none longer; each epoch draws one of all."""
    group: str | None = None
    """What it is held out with."""
    grids: tuple[Grid, ...] = ()
    """Of the items that are read, as their headers have it."""
    said: str | None = None
    """What its only item says, where the record is nothing but an item and its text."""

    @property
    def ways(self) -> tuple[Example, ...]:
        return (self, *self.others)

    def cut(self, start: int, stop: int) -> Example:
        """A part of it, without its items."""
        return Example(self.ids[start:stop], self.counted[start:stop])

    def without_text(self) -> Example:
        """The same item with nothing said: what counts is the end alone."""
        kept = ~self.counted
        kept[-1] = True
        return self._replace(ids=self.ids[kept], counted=self.counted[kept], said="")

    def fitted(self, items: Sequence[MediaItem], config: ModelConfig) -> Example:
        """With as many placeholders as its decoded items take, which may differ from what their
        headers say."""
        times = np.ones(len(self.ids), np.int64)
        places = {
            name: (self.ids == MEDIA[name].token(config)).nonzero()[0].tolist()
            for name in {file.medium for file in self.files}
        }
        for file, grid, item in zip(self.files, self.grids, items):
            measured = MEDIA[file.medium].length(grid)
            own, places[file.medium] = (
                places[file.medium][:measured], places[file.medium][measured:],
            )  # fmt: skip
            times[own[item.length :]] = 0
            times[own[0]] += max(0, item.length - measured)
        if (times == 1).all():
            return self
        return self._replace(ids=self.ids.repeat(times), counted=self.counted.repeat(times))


def unlabelled(examples: Iterable[Example]) -> Counter[str]:
    """By medium, the examples whose text is too long for the encoder's own loss on their item."""
    return Counter(
        example.files[0].medium
        for example in examples
        if example.said is not None
        and MEDIA[example.files[0].medium].label(example.said, example.grids[0]) is None
    )
