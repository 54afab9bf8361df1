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
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from looptx_core.errors import DataError
from looptx_core.machine.integrity import SUFFIX, note_digest

FORMAT_VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")


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
            raise _as_os_error(error) from error
        _to_disk(file)
        note_digest(file)


def commit(
    partial: Path, folder: Path, common: dict[str, Any], shapes: dict[str, list[int]],
    world_size: int,
) -> None:  # fmt: skip
    """What all ranks share, then the checkpoint's name: it is whole from here on."""
    torch.save(common, partial / "common.ckpt")
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": int(common["global_step"]),
        "world_size": world_size,
        "shapes": shapes,
    }
    (partial / "manifest.json").write_text(json.dumps(manifest))
    for name in ("common.ckpt", "manifest.json"):
        _to_disk(partial / name)
        note_digest(partial / name)
    partial.replace(folder)


@dataclass
class Checkpoint:
    """A checkpoint to read from. Raises `DataError` for one that is not whole."""

    folder: Path
    manifest: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text())
            version, self._where = self.manifest["format_version"], self._index()
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(
                f"{self.folder}: not a whole checkpoint of a sharded run ({error}); remove it to "
                "go on from the one before"
            ) from error
        if version != FORMAT_VERSION:
            raise DataError(
                f"{self.folder}: a checkpoint of format {version}, and this looptx reads "
                f"{FORMAT_VERSION}; update looptx"
            )

    @property
    def files(self) -> list[Path]:
        """All files but the digests beside them."""
        return sorted(file for file in self.folder.iterdir() if file.suffix != SUFFIX)

    @property
    def world_size(self) -> int:
        return int(self.manifest["world_size"])

    @property
    def shapes(self) -> dict[str, list[int]]:
        return dict(self.manifest["shapes"])

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
            raise DataError(f"{self.folder}: lacks a part of {name}; remove it to go on from the "
                            "one before")  # fmt: skip
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


def remove_partial(checkpoints: Path) -> None:
    """Remove what a kill left half-written."""
    for partial in checkpoints.glob("*.partial"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)


def _key(name: str, kind: str) -> str:
    return f"{name}|{kind}" if kind else name


def _to_disk(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _as_os_error(error: SafetensorError) -> Exception:
    full = "os error 28" in str(error)
    return OSError(errno.ENOSPC if full else errno.EIO, str(error))
