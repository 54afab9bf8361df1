"""Tokenised corpora, read by memory map; `shard_writer` writes them.

A folder holds `tokenizer.json`, `manifest.json` and, for each split, `<split>-00000.bin` and so
on: little-endian token ids, documents one after the other, each followed by the end token.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from looptx_core.data.tokenizer import fingerprint, load_tokenizer
from looptx_core.errors import DataError, UsageError

SCHEMA_VERSION = 1
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Counts:
    """What a split holds; `bytes` of UTF-8 text, and `tokens` with the end tokens."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    file: str
    split: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """How documents came to a split: `rule` is 'hash', 'few' or 'tail'."""

    rule: str
    description: str
    val_fraction: float
    seed: int


@dataclass(frozen=True)
class Manifest:
    """The facts about a folder of shards, as in `manifest.json`.

    Bits per byte of a split: its loss in bits, summed, over `splits[name].bytes`.
    """

    documents: int
    bytes: int  # of UTF-8 text
    tokens: int  # with the end tokens
    bytes_per_token: float
    vocab_size: int
    dtype: str  # of the shards, for numpy
    end_id: int
    tokenizer: str  # fingerprint
    splits: dict[str, Counts]
    split: Split
    shards: list[Shard]
    inputs: list[dict[str, Any]] = field(default_factory=list)  # name and bytes of each
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read `folder`/manifest.json.

        Raises:
            DataError: it is missing, damaged or of another version.
        """
        file = Path(folder) / "manifest.json"
        try:
            facts = json.loads(file.read_text("utf-8"))
            version = facts["schema_version"]
        except OSError as error:
            raise DataError(
                f"{folder}: no tokenised data ({error.strerror}); make some by looptx tokenize"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: damaged; tokenise the text again") from error
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{file}: schema version {version}, but this looptx reads {SCHEMA_VERSION}; "
                "tokenise the text again"
            )
        try:
            facts.pop("command", None)  # marks the folder for `looptx_core.outputs`
            facts["splits"] = {name: Counts(**facts["splits"][name]) for name in SPLITS}
            facts["split"] = Split(**facts["split"])
            facts["shards"] = [Shard(**shard) for shard in facts["shards"]]
            return cls(**facts)
        except (KeyError, TypeError) as error:
            raise DataError(f"{file}: damaged ({error}); tokenise the text again") from error

    @property
    def fingerprint(self) -> str:
        """Of the tokens, whatever they are called and wherever they lie."""
        tokens = [(shard.split, shard.tokens, shard.sha256) for shard in self.shards]
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


class Tokens:
    """The tokens of one split, read by memory map across files. Pickles as its paths."""

    def __init__(self, files: Sequence[Path], dtype: str) -> None:
        self._files, self._dtype = files, dtype
        self._maps = [np.memmap(file, np.dtype(dtype), "r") for file in files]
        self._starts = list(accumulate((len(part) for part in self._maps), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[type[Tokens], tuple[Sequence[Path], str]]:
        return Tokens, (self._files, self._dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64 of shape (stop - start,).

        Raises:
            IndexError: not 0 <= start <= stop <= len(self).
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        out = np.empty(stop - start, np.int64)
        first = bisect.bisect_right(self._starts, start) - 1
        for part, origin in zip(self._maps[first:], self._starts[first:]):
            if origin >= stop:
                break
            low, high = max(start, origin), min(stop, origin + len(part))
            out[low - start : high - start] = part[low - origin : high - origin]
        return out


class Shards:
    """An opened folder of shards; get one from `open_shards`."""

    def __init__(self, folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.manifest = manifest
        self.tokenizer = tokenizer

    def tokens(self, split: str) -> Tokens:
        """The tokens of 'train' or 'val'."""
        if split not in SPLITS:
            raise UsageError(f"no split '{split}'; choose from {', '.join(SPLITS)}")
        files = [self.folder / shard.file for shard in self.manifest.shards if shard.split == split]
        return Tokens(files, self.manifest.dtype)


def open_shards(folder: str | os.PathLike[str], verify: bool = False) -> Shards:
    """Open what `tokenize_corpus` wrote; `verify` also hashes every shard.

    Raises:
        DataError: no such folder, another version, or files that are not the manifest's.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    tokenizer = load_tokenizer(folder)
    if fingerprint(tokenizer) != manifest.tokenizer:
        raise DataError(
            f"{folder}: tokenizer.json is not the one that made these shards; "
            "put it back or tokenise the text again"
        )
    if manifest.dtype not in ("<u2", "<u4"):
        raise DataError(f"{folder}: unknown dtype {manifest.dtype}; tokenise the text again")
    for shard in manifest.shards:
        file = folder / shard.file
        expected = shard.tokens * np.dtype(manifest.dtype).itemsize
        try:
            size = file.stat().st_size
            if size != expected:
                raise DataError(
                    f"{file}: {size} bytes instead of {expected}; tokenise the text again"
                )
            if verify:
                with file.open("rb") as data:
                    if hashlib.file_digest(data, "sha256").hexdigest() != shard.sha256:
                        raise DataError(f"{file}: its hash is wrong; tokenise the text again")
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}; tokenise the text again") from error
    for name in SPLITS:
        held = sum(shard.tokens for shard in manifest.shards if shard.split == name)
        if held != manifest.splits[name].tokens:
            raise DataError(f"{folder}: manifest.json contradicts itself; tokenise the text again")
    return Shards(folder, manifest, tokenizer)
