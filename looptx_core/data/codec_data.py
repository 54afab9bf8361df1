"""What a codec is trained on and judged by: pictures, or stretches of recordings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from looptx_core.config.codec import MEDIUM_OF, CodecConfig
from looptx_core.data.records import raw_records
from looptx_core.data.split import hold_out
from looptx_core.errors import DataError, UsageError
from looptx_core.media.base import FolderMedium, Medium
from looptx_core.media.registry import MEDIA

MOST_BYTES = 8 << 30
"""Of all items together, decoded: they are held in memory."""

Progress = Callable[[int, int], object]
"""(files, all files)."""


def read_items(
    inputs: Sequence[str],
    config: CodecConfig,
    *,
    val_fraction: float,
    seed: int,
    on_progress: Progress = lambda done, of: None,
) -> tuple[Tensor, Tensor]:
    """What to train on and to judge by, each (n, patches, numbers) of bytes.

    inputs: folders of pictures or recordings, or records that name some, as for `looptx train`;
    their texts are not needed. A recording becomes several stretches. Files of one `group`, or of
    equal texts, are held out together.

    Raises:
        DataError: a file that can't be read, or fewer than two.
        UsageError: more than memory shall hold.
    """
    medium = cast(FolderMedium, MEDIA[MEDIUM_OF[config.kind]])
    named = list(dict.fromkeys(_named(inputs, medium)))
    if len(named) < 2:
        where = ", ".join(inputs)
        raise DataError(f"{where}: {len(named)} {medium.plural}; a codec needs 2 at least, and "
                        "thousands to be good")  # fmt: skip
    each, most = config.rows * config.columns * config.values, 0
    items: list[Tensor] = []
    for number, (file, where, _) in enumerate(named):
        items.append(medium.module("coded").training_items(file, config, where))
        most += len(items[-1]) * each
        if most * (1 if number else len(named)) > MOST_BYTES:
            raise UsageError(
                f"{len(named):,} {medium.plural} take over {MOST_BYTES >> 30} GiB, and all are "
                "held in memory; give fewer"
            )
        on_progress(number + 1, len(named))
    train, held = hold_out([key for *_, key in named], val_fraction, seed)
    return tuple(torch.cat([items[i] for i in sorted(part)]) for part in (train, held))  # type: ignore[return-value]


def _named(inputs: Sequence[str], medium: Medium) -> Iterator[tuple[Path, str, bytes]]:
    """Each file, what errors call it, and what it is held out by."""
    for where, folder, record in raw_records(inputs):
        if not isinstance(record, dict):
            continue
        parts = record.get("parts")
        holders = [record, *(parts if isinstance(parts, list) else [])]
        key = record.get("group") or record.get("text")
        for name in _paths(holders, (medium.name, medium.write_key or medium.name)):
            file = folder / name
            if not file.is_file():
                raise DataError(f"{where}: no {medium.noun} {name}; mend the path")
            label = f"{where}: {file}" if str(file) not in where else str(file)
            yield file, label, json.dumps(key or str(file)).encode()


def _paths(holders: Sequence[Any], keys: Sequence[str]) -> Iterator[str]:
    for part in holders:
        for key in dict.fromkeys(keys) if isinstance(part, dict) else ():
            value = part.get(key)
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, str):
                    yield path
