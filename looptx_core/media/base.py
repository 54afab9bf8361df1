"""What a medium is: the methods by which the rest of the package reads, models and shows it.

This module imports neither torch nor a decoder, so that the registry is cheap to ask.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from looptx_core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from looptx_core.config.model import ModelConfig
    from looptx_core.media.batch import MediaBatch, MediaItem
    from looptx_core.media.writer import Writer

Source = str | os.PathLike[str] | bytes
"""A file, by its path or by its content."""
Grid = tuple[int, ...]
"""The extents of an item along its own axes, such as rows and columns of patches."""
POSITION = 0.08
"""Seconds that one position of time stands for, in every medium that has time."""


def clock(seconds: float) -> str:
    """As '1:02:03.5', or '2:03.5'."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


class Encoded(NamedTuple):
    """What an encoder made of a batch."""

    vectors: Tensor
    """(tokens of all items, d_model), in the order of their places."""
    loss: Tensor | None = None
    """Scalar: of an objective that the encoder has by itself, on the batch's labels."""


class Chunk(NamedTuple):
    """A part of an item that is too long to be read at once."""

    start: float
    """Seconds from the item's beginning, without the overlap with the piece before."""
    end: float
    """The same of its end."""
    item: MediaItem


class MediumLosses(NamedTuple):
    """A medium's own objective on the hidden tokens of a batch. Scalars."""

    loss: Tensor
    """For the whole model; its value is logged too."""
    confidence_loss: Tensor
    """For the head's estimate of its own success."""


class Walk(Protocol):
    """A model's loops over one item, which stands after an end token."""

    head: nn.Module | None
    """Of the medium's own objective."""
    config: ModelConfig

    def __call__(self, hidden: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """After each loop the state, and what the output head reads of it, (length, d_model).

        hidden: (rows,) bool, rows of the item that the encoder must do without.
        """


class Figure(NamedTuple):
    """A plot of a report: its file, the function that draws it on axes, and how many axes."""

    file: str
    draw: Callable[[Any], None]
    axes: int


class Medium:
    """One medium, such as images. Subclasses override what differs from a causal sequence.

    An item of the medium takes the place of `length(grid)` placeholder tokens. The encoder makes
    one vector of the model's width for each of them (LLaVA, arXiv 2304.08485).
    """

    name: str
    """The key of records and batches, and of its section in a `ModelConfig`."""
    noun: str
    """What messages call one item, as in 'a picture'."""
    plural: str
    marker: str
    """What stands for an item in a text, as '<|image|>'."""
    suffixes: tuple[str, ...] = ()
    """Of files of this medium, in lower case."""
    ability: str
    """What a model that reads it is said to have; see `checkpoint.registry.abilities`."""
    write_ability: str = ""
    """What a model that writes it is said to have."""
    part: str = ""
    """The type of a part of a chat message that holds an item, as OpenAI's API names it."""
    unasked: bool = True
    """Whether training writes some items to no text, for guidance."""
    write_key: str | None = None
    """The key of a record's part that the model learns to write, where it can."""
    grid_names: tuple[str, ...] = ("length",)
    """What the extents of a grid are called in a report."""
    axes: int = 1
    """The coordinates by which this medium's tokens are turned: 1 for time, 2 for row and column, 3
    for all three. They belong to the medium, so that a model keeps what it learned of one when it
    gets another."""
    encoder_name: str = ""
    """The name of the encoder among the model's modules, and thus in its weights' names."""
    head_name: str = ""
    """The same of the head for the medium's own objective."""
    size_key: str = ""
    """The key of a configuration that sets the encoder's size."""
    labelled: bool = False
    """Whether an item may have a label; see `label`."""

    # Configuration

    def enabled(self, settings: Mapping[str, Any]) -> bool:
        """Whether a model has this medium. settings: the keys of its config.json."""
        return self.name in (settings.get("media") or {})

    def enable(self, config: ModelConfig) -> ModelConfig:
        """The configuration with this medium at its default size, for training on it."""
        return replace(config, media={**config.media, self.name: {}})

    def enable_head(self, config: ModelConfig) -> ModelConfig:
        """The configuration with the head for the medium's own objective."""
        raise NotImplementedError(f"{self.plural} have no objective of their own")

    def describe(self, config: ModelConfig) -> str:
        """What a model that is to be trained has for it, in a few words."""
        return "an encoder"

    def section(self, config: ModelConfig) -> Mapping[str, Any]:
        """This medium's part of the configuration."""
        return config.media.get(self.name, {})

    def token(self, config: ModelConfig) -> int:
        """The id of the placeholder token."""
        raise NotImplementedError

    def files(self, config: ModelConfig) -> dict[str, Any]:
        """JSON documents to store beside the model, by file name."""
        return {}

    # Reading

    def claims(self, file: Path) -> bool:
        """Whether a file in a folder of media is of this medium."""
        return file.suffix.lower() in self.suffixes

    def longest(self, grid: Grid) -> int:
        """The most tokens that an item takes once it is changed for training."""
        return self.length(grid)

    def blank(self, grid: Grid, config: ModelConfig, draw: Any) -> MediaItem | None:
        """Now and then an item without content, from which a model learns to say nothing; most
        often None. draw: a `numpy.random.Generator`."""
        return None

    def measure(self, source: Source, config: ModelConfig, where: str | None = None) -> Grid:
        """An item's grid, from the file's header alone. Errors: those of `read`."""
        return self.read(source, config, where).grid

    def read(
        self,
        source: Source,
        config: ModelConfig,
        where: str | None = None,
        augment: Any = None,
    ) -> MediaItem:
        """Decode one item within limits that no small file can break.

        Args:
            where: what errors call it; absent: its path.
            augment: a `numpy.random.Generator` that draws changes of the item, for training; None
                changes nothing.
        Raises:
            DataError: unreadable, damaged or too large.
        """
        raise NotImplementedError

    def pieces(
        self, source: Source, config: ModelConfig, where: str | None = None
    ) -> Iterator[Chunk]:
        """An item of any length as overlapping pieces that a model can read at once, in order.

        Raises the errors of `read`, and `UsageError` for a medium that has no length in time.
        """
        raise UsageError(f"{self.plural} have no length in time, so none is read in pieces")

    # Layout

    def length(self, grid: Grid) -> int:
        """The tokens that an item takes."""
        return math.prod(grid)

    def positions(self, grid: Grid) -> Tensor:
        """Each token's coordinates from the item's first one, (axes, length).

        By default all coordinates are equal, as those of text. One position of time is `POSITION`
        seconds.
        """
        import torch

        return torch.arange(self.length(grid)).expand(self.axes, -1)

    def span(self, grid: Grid) -> int:
        """The positions after which the following token stands."""
        return self.length(grid)

    def groups(self, grid: Grid, config: ModelConfig) -> Tensor | None:
        """Numbers from 0 up, (length,): tokens of one group attend to each other both ways.

        None: all tokens attend to earlier ones only.
        """
        return None

    # The model

    def encoder(self, config: ModelConfig) -> nn.Module | None:
        """A module from a `MediaBatch` to (tokens of all items, d_model); None: nothing is read."""
        return None

    def encode(self, encoder: nn.Module, batch: MediaBatch) -> Encoded:
        """What the encoder makes of a batch, with its own loss where the batch has labels."""
        return Encoded(encoder(batch))

    def label(self, text: str, grid: Grid) -> Tensor | None:
        """What an item says, (length,) integers, for the encoder's own loss; None: it has none, or
        the text is too long for the item."""
        return None

    def loss_weight(self, config: ModelConfig, progress: float) -> float:
        """What the encoder's own loss counts. progress: the share of the training that is done."""
        return 0.0

    def layers(self, config: ModelConfig) -> int:
        """The encoder's layers, each with tensors of its own."""
        return 0

    def head(self, config: ModelConfig) -> nn.Module | None:
        """A module for the medium's own objective; None: there is none."""
        return None

    def flops(self, config: ModelConfig) -> int:
        """Forward FLOPs of the encoder for one token."""
        return 0

    def losses(
        self, head: nn.Module, states: Tensor, numbers: Tensor, batch: MediaBatch
    ) -> MediumLosses:
        """The medium's own objective, for a batch with hidden tokens.

        states: (rows, length, d_model), what the output head reads. numbers: (rows, length), which
        of the batch's tokens is hidden there, -1 elsewhere.
        """
        raise NotImplementedError

    # For people

    def inspect(self, walk: Walk, item: MediaItem) -> dict[str, Any]:
        """JSON values on what the loops do to one item."""
        return {}

    def sentences(self, found: Mapping[str, Any]) -> list[str]:
        """A report's entry of one item, in words."""
        return []

    def lines(self, found: Mapping[str, Any]) -> list[str]:
        """A report's entry of one item, as lines of a terminal."""
        return []

    def figures(self, found: Mapping[str, Any], number: int) -> dict[str, Figure]:
        """Plots of a report's entry, by title. number: of the item, for the files' names."""
        return {}

    # Writing

    def writes(self, settings: Mapping[str, Any]) -> bool:
        """Whether a model writes this medium. settings: the keys of its config.json."""
        return False

    def codes(self, config: ModelConfig) -> int:
        """The rows of the vocabulary that a model of this configuration needs to write."""
        return 0

    def with_codes(self, config: ModelConfig, first: int) -> ModelConfig:
        """The configuration in which code 0 has this id; the rows before are the text's."""
        section = {**self.section(config), "first_code": first}
        return replace(config, media={**config.media, self.name: section})

    def writer(self, config: ModelConfig) -> Writer | None:
        """How this model writes the medium; None: it does not."""
        return None


class FolderMedium(Medium):
    """A medium whose reader and maps are modules of its folder, imported when they are needed.

    By name, so that an exported model takes along its encoder but no reader.
    """

    def module(self, name: str) -> Any:
        """A module of this medium's folder."""
        return importlib.import_module(f"{type(self).__module__.rpartition('.')[0]}.{name}")

    def inspect(self, walk: Walk, item: MediaItem) -> dict[str, Any]:
        return self.module("maps").inspect(walk, item)

    def sentences(self, found: Mapping[str, Any]) -> list[str]:
        return self.module("maps").sentences(found)

    def lines(self, found: Mapping[str, Any]) -> list[str]:
        return self.module("maps").lines(found)

    def figures(self, found: Mapping[str, Any], number: int) -> dict[str, Any]:
        return self.module("maps").figures(found, number)
