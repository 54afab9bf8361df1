"""The pictures that a codec is trained on and judged by."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from looptx_core.config.codec import CodecConfig
from looptx_core.data.records import raw_records
from looptx_core.data.split import hold_out
from looptx_core.errors import DataError, UsageError
from looptx_core.media.image.coded import read_patches

MOST_BYTES = 8 << 30
"""Of all pictures together, decoded: they are held in memory."""
_KEYS = ("image", "draw")

Progress = Callable[[int, int], object]
"""(pictures, all pictures)."""


def read_pictures(
    inputs: Sequence[str],
    config: CodecConfig,
    *,
    val_fraction: float,
    seed: int,
    on_progress: Progress = lambda done, of: None,
) -> tuple[Tensor, Tensor]:
    """Pictures to train on and to judge by, each (n, patches, numbers) of bytes.

    inputs: folders of pictures, or records that name some, as for `looptx train`; their texts are
    not needed. Pictures of one `group`, or of equal texts, are held out together.

    Raises:
        DataError: a picture that can't be read, or fewer than two.
        UsageError: more than memory shall hold.
    """
    named = list(dict.fromkeys(_named(inputs)))
    if len(named) < 2:
        where = ", ".join(inputs)
        raise DataError(f"{where}: {len(named)} pictures; a codec needs 2 at least, and thousands "
                        "to be good")  # fmt: skip
    each = config.rows * config.columns * config.values
    if each * len(named) > MOST_BYTES:
        raise UsageError(
            f"{len(named):,} pictures of {each:,} bytes are over {MOST_BYTES >> 30} GiB, and all "
            "are held in memory; give fewer"
        )
    pictures = torch.empty(len(named), config.rows * config.columns, config.values,
                           dtype=torch.uint8)  # fmt: skip
    for number, (file, where, _) in enumerate(named):
        pictures[number] = read_patches(file, config, where)
        on_progress(number + 1, len(named))
    train, held = hold_out([key for *_, key in named], val_fraction, seed)
    return pictures[sorted(train)], pictures[sorted(held)]


def _named(inputs: Sequence[str]) -> Iterator[tuple[Path, str, bytes]]:
    """Each picture's file, what errors call it, and what it is held out by."""
    for where, folder, record in raw_records(inputs):
        if not isinstance(record, dict):
            continue
        parts = record.get("parts")
        holders = [record, *(parts if isinstance(parts, list) else [])]
        key = record.get("group") or record.get("text")
        for name in _paths(holders):
            file = folder / name
            if not file.is_file():
                raise DataError(f"{where}: no picture {name}; mend the path")
            label = f"{where}: {file}" if str(file) not in where else str(file)
            yield file, label, json.dumps(key or str(file)).encode()


def _paths(holders: Sequence[Any]) -> Iterator[str]:
    for part in holders:
        for key in _KEYS if isinstance(part, dict) else ():
            value = part.get(key)
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, str):
                    yield path
