"""A grid of settings for `looptx train`: which runs it comes to."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looptx_core.config.model import ModelConfig
from looptx_core.config.resolve import PREFIX, config_file, keys_in, keys_of, resolve
from looptx_core.config.run import TrainConfig
from looptx_core.documents import short
from looptx_core.errors import UsageError
from looptx_core.schema import coerce

MOST_RUNS = 1_000
FILE = "sweep.json"
"""Of a sweep's folder: what its runs reached."""
SECTIONS = {"model": ModelConfig}
_SEEDS = "seeds"
_OTHERS = {
    "seed": "give `seeds` a list",
    "out": "the runs stand in the sweep's own folder",
    "max_minutes": "each run does all of its steps",
    "devices": "each run takes one device",
    "nodes": "each run takes one machine",
}
"""Keys of `looptx train` that a grid can't have, and why."""
_NAME = 60
"""Characters of a run's folder, without its hash."""

Values = Mapping[str, Any]
"""Settings by dotted key."""


@dataclass(frozen=True)
class Cell:
    """One run: settings by dotted key, those of the grid that vary and those that don't."""

    varied: Values
    fixed: Values
    seed: int

    @property
    def settings(self) -> Values:
        """All of it, as `looptx train` takes them."""
        return {**self.fixed, **self.varied, "seed": self.seed}

    @property
    def name(self) -> str:
        """The run's folder: what varies, and a hash of all settings.

        A run whose settings are others has another name, so that a finished one is never mistaken.
        """
        said = "-".join(f"{key.rpartition('.')[2]}-{shown(v)}" for key, v in self.varied.items())
        said = re.sub(r"[^\w.-]+", "_", said)[:_NAME].strip("-_.")
        text = json.dumps(dict(self.settings), sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return "-".join(part for part in (said, f"seed-{self.seed}", digest) if part)


@dataclass(frozen=True)
class Grid:
    """Every combination of the axes' values, with every seed."""

    axes: dict[str, list[Any]]
    """Keys with several values."""
    fixed: dict[str, Any]
    """Keys with one."""
    seeds: list[int]

    @property
    def cells(self) -> list[list[Cell]]:
        """The runs of each combination, one a seed."""
        return [
            [Cell(dict(zip(self.axes, values)), self.fixed, seed) for seed in self.seeds]
            for values in itertools.product(*self.axes.values())
        ]


def read_grid(file: Path) -> Grid:
    """Read a YAML file of keys of `looptx train`, each with a list of values, and of `seeds`.

    A key with a single value in place of a list is the same in all runs. Without `seeds`, seed 0.

    Raises:
        UsageError: a key that `looptx train` has not or a grid can't have, an empty list, a value
            twice, more than `MOST_RUNS` runs, settings that do not fit together, or settings in the
            environment.
    """
    _check_environment()
    hints = keys_of({"": TrainConfig, **SECTIONS})
    axes: dict[str, list[Any]] = {}
    fixed: dict[str, Any] = {}
    seeds = [0]
    for key, (value, where) in keys_in(file, {**hints, _SEEDS: list}, SECTIONS).items():
        if key in _OTHERS:
            raise UsageError(f"{where}: '{key}' can't stand in a grid; {_OTHERS[key]}")
        if value == []:
            raise UsageError(f"{where}: {key} has an empty list; give it values, or remove it")
        if key == _SEEDS:
            if not isinstance(value, list):
                raise UsageError(f"{where}: seeds is a list, such as [0, 1, 2]")
            seeds = _distinct(value, int, f"{where}: {key}")
            continue
        values = _distinct(value if isinstance(value, list) else [value], hints[key],
                           f"{where}: {key}")  # fmt: skip
        if len(values) > 1:
            axes[key] = values
        else:
            fixed[key] = values[0]
    count = math.prod(map(len, (*axes.values(), seeds)))
    if count > MOST_RUNS:
        raise UsageError(
            f"{file}: {count:,} runs, and the limit is {MOST_RUNS:,}; give fewer values or seeds"
        )
    grid = Grid(axes, fixed, seeds)
    for cell, *_ in grid.cells:
        try:
            resolved = resolve(TrainConfig, SECTIONS, flags=dict(cell.settings))
            settings, model = resolved.build(TrainConfig), resolved.build(ModelConfig, "model")
            if settings.epochs is not None and resolved.given("steps"):
                raise UsageError("`epochs` and `steps` each say how long a run is; leave one out")
            if settings.init and resolved.given("preset"):
                raise UsageError("`init` brings the model's own shape; leave out `preset`")
            if not settings.init:  # which brings its own shape
                settings.check_context(model.max_seq_len)
        except UsageError as error:
            said = ", ".join(f"{key} {shown(value)}" for key, value in cell.varied.items())
            raise UsageError(f"{file}{said and f', with {said}'}: {error}") from error
    return grid


def _check_environment() -> None:
    """Raise `UsageError` for settings beside the grid, which no run's name would tell."""
    if config_file(None):
        given = [PREFIX + "CONFIG"]
    else:
        origins = resolve(TrainConfig, SECTIONS).origins.values()
        given = [origin for origin in origins if origin.startswith(PREFIX)]
    if given:
        raise UsageError(f"{given[0]} is set, and a sweep has all settings in its grid; unset it")


def _distinct(values: list[Any], hint: Any, where: str) -> list[Any]:
    """The values, each of a key's type; a text alone is one of a key that takes several."""
    found: list[Any] = []
    for value in values:
        made = coerce(value, hint, where)
        if made in found:
            raise UsageError(f"{where}: {short(shown(made))} is there twice; leave one out")
        found.append(made)
    return found


def shown(value: Any) -> str:
    """A value as a flag has it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
