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
from looptx_core.media.registry import MEDIA, writers

CODES_COUNT = 20
"""What all codes of a record count together as targets, in words."""


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


def code_ranges(config: ModelConfig | None) -> list[range]:
    """The ids of the codes of each medium that a model writes."""
    found = writers(config).values() if config else ()
    return [range(writer.first_code, writer.first_code + writer.codes) for writer in found]


def target_weights(example: Example, codes: Iterable[range]) -> np.ndarray:
    """How much each token counts as a target, (tokens,) float32: 1, or 0 where it does not.

    An item has more codes than its text has words, so that all of them together count what
    `CODES_COUNT` words do.
    """
    found = example.counted.astype(np.float32)
    for ids in codes:
        is_code = example.counted & (example.ids >= ids.start) & (example.ids < ids.stop)
        found[is_code] = min(1.0, CODES_COUNT / max(1, int(is_code.sum())))
    return found


def unlabelled(examples: Iterable[Example]) -> Counter[str]:
    """By medium, the examples whose text is too long for the encoder's own loss on their item."""
    return Counter(
        example.files[0].medium
        for example in examples
        if example.said is not None
        and MEDIA[example.files[0].medium].label(example.said, example.grids[0]) is None
    )
