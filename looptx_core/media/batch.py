"""Items of media as tensors: one item, a batch of them, and where they stand among tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from looptx_core.config.model import ModelConfig
from looptx_core.media.base import Grid, Medium
from looptx_core.media.registry import MEDIA, media_for

_PREFIX = "media."
_ENTRIES = ("features", "grids", "labels", "label_lengths")


class MediaItem(NamedTuple):
    """One decoded item."""

    medium: str
    """Its name in the registry."""
    features: Tensor
    """(rows, values), what the encoder reads; for images a patch a row, -1 to 1."""
    grid: Grid
    label: Tensor | None = None
    """(length,), what it says, for the encoder's own loss; see `Medium.label`."""

    @property
    def length(self) -> int:
        """The tokens whose places it takes."""
        return MEDIA[self.medium].length(self.grid)


@dataclass(frozen=True)
class MediaBatch:
    """The items of one medium in a batch, in the order of their placeholder tokens.

    features: (rows of all items, values). grids: (items, axes of a grid), integers. hidden: (rows
    of all items,) bool, the rows that the encoder must do without; None: none. labels: those of
    all items after one another, and label_lengths: (items,), how long each is, -1 where an item
    has none; both None: the batch has none.
    """

    features: Tensor
    grids: Tensor
    hidden: Tensor | None = None
    labels: Tensor | None = None
    label_lengths: Tensor | None = None

    def to(self, device: torch.device) -> MediaBatch:
        """Moved to a device; grids and lengths stay, as shapes are made of them."""
        hidden = None if self.hidden is None else self.hidden.to(device)
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, features=self.features.to(device), hidden=hidden, labels=labels)


Media = Mapping[str, MediaBatch]
"""A batch's items by medium; a medium that is absent has none."""


def batch_items(items: Iterable[MediaItem]) -> dict[str, MediaBatch]:
    """The items of a batch by medium."""
    by_medium: dict[str, list[MediaItem]] = {}
    for item in items:
        by_medium.setdefault(item.medium, []).append(item)
    return {name: _batch(MEDIA[name], some) for name, some in by_medium.items()}


def _batch(medium: Medium, items: list[MediaItem]) -> MediaBatch:
    features = torch.cat([item.features for item in items])
    grids = torch.tensor([item.grid for item in items])
    if not medium.labelled:
        return MediaBatch(features, grids)
    nothing = torch.zeros(0, dtype=torch.long)
    labels = torch.cat([nothing if i.label is None else i.label for i in items])
    lengths = torch.tensor([-1 if i.label is None else len(i.label) for i in items])
    return MediaBatch(features, grids, labels=labels, label_lengths=lengths)


def to_device(media: Media, device: torch.device) -> dict[str, MediaBatch]:
    return {name: batch.to(device) for name, batch in media.items()}


def to_entries(media: Media) -> dict[str, Tensor]:
    """As entries of a sample, which collate by concatenation."""
    return {
        f"{_PREFIX}{name}.{part}": value
        for name, batch in media.items()
        for part in _ENTRIES
        if (value := getattr(batch, part)) is not None
    }


def is_entry(key: str) -> bool:
    """Whether a sample's entry belongs to a medium."""
    return key.startswith(_PREFIX)


def from_entries(batch: Mapping[str, Tensor]) -> dict[str, MediaBatch]:
    """The media of a collated batch."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in filter(is_entry, batch):
        _, name, part = key.split(".")
        found.setdefault(name, {})[part] = batch[key]
    return {name: MediaBatch(**parts) for name, parts in found.items()}


def hide(media: Media, shares: Mapping[str, float]) -> dict[str, MediaBatch]:
    """Hide a share of each medium's rows, drawn by torch's generator of the CPU."""

    def hidden(name: str, batch: MediaBatch) -> MediaBatch:
        if not shares.get(name):
            return batch
        drawn = torch.rand(len(batch.features)) < shares[name]
        return replace(batch, hidden=drawn.to(batch.features.device))

    return {name: hidden(name, batch) for name, batch in media.items()}


def hidden_numbers(tokens: Tensor, token: int, hidden: Tensor) -> Tensor:
    """Of each token the number of its hidden row, -1 for all others; shaped as the tokens."""
    found = torch.full_like(tokens, -1)
    numbers = torch.arange(len(hidden), device=tokens.device)
    found[tokens == token] = numbers.masked_fill(~hidden, -1)
    return found


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch stand.

    positions: (axes, batch, length), see `position_axes`. groups: (batch, length), tokens of one
    number attend to each other both ways, -1: to earlier ones only; None: all to earlier ones only.
    following: (batch, length), the position that follows each token.
    """

    positions: Tensor
    groups: Tensor | None
    following: Tensor

    @property
    def ends(self) -> Tensor:
        """The position that follows the last token, (batch,)."""
        return self.following[:, -1]

    def part(self, columns: slice) -> Layout:
        """Of some columns, as if the text began with them."""
        start = self.following[:, columns.start - 1 : columns.start] if columns.start else 0
        groups = None if self.groups is None else self.groups[:, columns]
        return Layout(
            self.positions[..., columns] - start, groups, self.following[:, columns] - start
        )


def position_axes(config: ModelConfig) -> int:
    """The coordinates of a position in a model: frequency i of RoPE turns by coordinate i modulo
    this number.

    It is the least common multiple of the media's own axes. Coordinate i holds a medium's own
    coordinate i modulo `Medium.axes`, so that each medium is turned as if it were the only one.
    """
    return math.lcm(*(medium.axes for medium in media_for(config)))


def lay_out(
    tokens: Tensor, media: Media, config: ModelConfig, padding: Tensor | None = None
) -> Layout:
    """Positions of a batch's tokens, (batch, length), with the placeholders of these media.

    A text token has the same coordinate on every axis. An item whose first token stands at p has
    its tokens at p plus `Medium.positions`, and what follows stands at p plus `Medium.span`
    (M-RoPE, arXiv 2409.12191). padding: (batch,), columns at the left that are no tokens.

    Raises `ValueError` where placeholders and items do not match.
    """
    step = torch.ones_like(tokens)
    if padding is not None:
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        step[columns < padding[:, None].to(tokens.device)] = 0
    axes = position_axes(config)
    offsets = torch.zeros(axes, *tokens.shape, dtype=torch.long, device=tokens.device)
    groups, count = torch.full_like(tokens, -1), 0
    for name, batch in media.items():
        medium = MEDIA[name]
        for grid, row, here in _runs(tokens, medium, batch, config):
            step[row, here] = 0
            step[row, here.stop - 1] = medium.span(grid)
            own_axis = torch.arange(axes) % medium.axes
            offsets[:, row, here] = medium.positions(grid)[own_axis].to(tokens.device)
            if (own := medium.groups(grid, config)) is not None:
                groups[row, here] = own.to(tokens.device) + count
                count += int(own.max()) + 1
    following = step.cumsum(1)
    return Layout(following - step + offsets, groups if count else None, following)


def _runs(
    tokens: Tensor, medium: Medium, batch: MediaBatch, config: ModelConfig
) -> Iterable[tuple[Grid, int, slice]]:
    """Each item's grid, and the row and the columns of its placeholders."""
    grids = [tuple(grid) for grid in batch.grids.tolist()]
    lengths = [medium.length(grid) for grid in grids]
    found = (tokens == medium.token(config)).nonzero()
    if len(found) != sum(lengths):
        raise ValueError(f"{len(found)} {medium.name} tokens for items of {sum(lengths)}")
    for number, (grid, run) in enumerate(zip(grids, found.split(lengths))):
        row, first = run[0].tolist()
        if run[-1].tolist() != [row, first + len(run) - 1]:
            raise ValueError(f"the {medium.name} tokens of item {number + 1} are not in one run")
        yield grid, row, slice(first, first + len(run))
