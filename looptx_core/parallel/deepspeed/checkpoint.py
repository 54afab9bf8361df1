"""Checkpoints of sharded runs: each rank's part of every weight and moment, without pickles.

    step-0000100.ckpt/
        manifest.json              format_version, step, world size, shape of each parameter
        common.ckpt                what all ranks share: Lightning's counters, schedules, buffers
        rank-00000-group-000.safetensors ...
        <file>.sha256              the digest of each of these

A group's file holds, for each parameter `p`, a contiguous piece of its flattened float32 master
weight under `p`, and of AdamW's moments under `p|exp_avg` and `p|exp_avg_sq`; the file's metadata
has each piece's offset. ZeRO 2 and 3, offloaded or not and over any number of ranks, differ only
in how they cut, so that each can go on from the other's.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from looptx_core.atomic import as_os_error, put_in_place, to_disk
from looptx_core.documents import read_json, short
from looptx_core.errors import DataError
from looptx_core.machine.integrity import SUFFIX, note_digest
from looptx_core.schema import typed

FORMAT_VERSION = 1
_MEND = "remove the checkpoint to go on from the one before"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds. shapes: of each parameter."""

    format_version: int
    step: int
    world_size: int
    shapes: dict[str, list[int]]


@dataclass
class TensorShard:
    """A contiguous part of a flattened parameter. tensors: by '', 'exp_avg' and 'exp_avg_sq'."""

    name: str
    offset: int
    tensors: dict[str, Tensor]


@dataclass
class Group:
    """Pieces that are in memory together, and how often their optimizer stepped."""

    pieces: list[TensorShard]
    step: int = 0


def write(partial: Path, rank: int, groups: Iterable[Group], needed: int) -> None:
    """A rank's files. needed: their bytes. Raises `OSError` where they don't fit."""
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"a checkpoint takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        )
    for number, group in enumerate(groups):
        tensors = {
            _key(piece.name, kind): tensor.detach().cpu().contiguous()
            for piece in group.pieces
            for kind, tensor in piece.tensors.items()
        }
        offsets = {piece.name: piece.offset for piece in group.pieces}
        file = partial / f"rank-{rank:05d}-group-{number:03d}.safetensors"
        try:
            save_file(tensors, file, {"offsets": json.dumps(offsets), "step": str(group.step)})
        except SafetensorError as error:
            raise as_os_error(error) from error
        to_disk(file)
        note_digest(file)


def commit(
    partial: Path, folder: Path, common: dict[str, Any], shapes: dict[str, list[int]],
    world_size: int,
) -> None:  # fmt: skip
    """What all ranks share, then the checkpoint's name: it is whole from here on."""
    torch.save(common, partial / "common.ckpt")
    manifest = Manifest(FORMAT_VERSION, int(common["global_step"]), world_size, shapes)
    (partial / "manifest.json").write_text(json.dumps(asdict(manifest)), "utf-8")
    for name in ("common.ckpt", "manifest.json"):
        to_disk(partial / name)
        note_digest(partial / name)
    to_disk(partial)
    put_in_place(partial, folder)


@dataclass
class Checkpoint:
    """A checkpoint to read from. Raises `DataError` for one that is not whole."""

    folder: Path

    def __post_init__(self) -> None:
        file = self.folder / "manifest.json"
        found = read_json(file, mend=_MEND)
        if (version := found.get("format_version")) != FORMAT_VERSION:
            raise DataError(
                f"{self.folder}: a checkpoint of format {short(version)}, and this looptx reads "
                f"{FORMAT_VERSION}; update looptx"
            )
        manifest = typed(Manifest, found, str(file), mend=_MEND)
        self.world_size, self.shapes = manifest.world_size, manifest.shapes
        try:
            self._where = self._index()
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(
                f"{self.folder}: not a whole checkpoint of a sharded run ({error}); {_MEND}"
            ) from error

    @property
    def files(self) -> list[Path]:
        """All files but the digests beside them."""
        return sorted(file for file in self.folder.iterdir() if file.suffix != SUFFIX)

    @property
    def step(self) -> int:
        """How often the optimizer stepped."""
        return max(step for *_, step in self._pieces())

    def common(self) -> dict[str, Any]:
        """Lightning's part; numbers, texts and tensors only."""
        return torch.load(self.folder / "common.ckpt", map_location="cpu", weights_only=True)

    def read(self, name: str, kind: str = "", start: int = 0, stop: int | None = None) -> Tensor:
        """A flattened parameter, or its elements from start to stop; only these are read.

        kind: '' for the master weight, or a moment's name. Elements past the parameter's end,
        which pad a shard, are 0.
        """
        size = 1
        for length in self.shapes[name]:
            size *= length
        stop = size if stop is None else stop
        out = torch.zeros(stop - start)
        found = 0
        for file, offset, length in self._where.get(name, []):
            first, last = max(start, offset), min(stop, offset + length, size)
            if first < last:
                with safe_open(file, "pt") as opened:
                    piece = opened.get_slice(_key(name, kind))
                    out[first - start : last - start] = piece[first - offset : last - offset]
                found += last - first
        if found != max(0, min(stop, size) - start):
            raise DataError(f"{self.folder}: lacks a part of {name}; {_MEND}")
        return out

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every master weight in its shape, one after the other."""
        for name, shape in self.shapes.items():
            yield name, self.read(name).view(shape)

    def _index(self) -> dict[str, list[tuple[Path, int, int]]]:
        where: dict[str, list[tuple[Path, int, int]]] = {}
        for file, name, offset, length, _ in self._pieces():
            where.setdefault(name, []).append((file, offset, length))
        return where

    def _pieces(self) -> Iterator[tuple[Path, str, int, int, int]]:
        for file in sorted(self.folder.glob("rank-*.safetensors")):
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
                for name, offset in json.loads(metadata["offsets"]).items():
                    length = opened.get_slice(name).get_shape()[0]
                    yield file, name, offset, length, int(metadata["step"])


def _key(name: str, kind: str) -> str:
    return f"{name}|{kind}" if kind else name
