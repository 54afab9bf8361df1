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

from looptx_core.data.tokenizer import (
    MOST_TOKENS,
    check_ids,
    fingerprint,
    load_tokenizer,
    vocabulary_size,
)
from looptx_core.documents import check_links, read_json, short
from looptx_core.errors import DataError, UsageError
from looptx_core.machine.integrity import check_digest
from looptx_core.schema import typed

SCHEMA_VERSION = 1
SPLITS = ("train", "val")
_AGAIN = "tokenise the text again"
_DAMAGED = f"it is damaged, so {_AGAIN}"


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
        if not file.exists():
            raise DataError(f"{folder}: no tokenised data; make some by looptx tokenize")
        facts = read_json(file, mend=_DAMAGED)
        if (version := facts.get("schema_version")) != SCHEMA_VERSION:
            raise DataError(
                f"{file}: schema version {short(version)}, but this looptx reads {SCHEMA_VERSION}; "
                f"{_AGAIN}"
            )
        facts.pop("command", None)  # marks the folder for `looptx_core.outputs`
        found = typed(cls, facts, str(file), mend=_DAMAGED)
        found._check(file)
        return found

    def _check(self, file: Path) -> None:
        """Raise `DataError` for facts that no folder of shards can have."""

        def need(ok: bool, what: str) -> None:
            if not ok:
                raise DataError(f"{file}: {what}; {_DAMAGED}")

        need(set(self.splits) == set(SPLITS), f"the splits are not {' and '.join(SPLITS)}")
        need(1 <= self.vocab_size <= MOST_TOKENS, f"vocab_size {self.vocab_size:,} is no size")
        need(0 <= self.end_id < self.vocab_size, f"end_id {self.end_id:,} is no token")
        need(self.dtype in ("<u2", "<u4"), f"unknown dtype {short(self.dtype)}")
        need(0 < self.split.val_fraction < 1, f"val_fraction {self.split.val_fraction} is no share")
        counts = [n for part in self.splits.values() for n in (part.bytes, part.tokens)]
        need(min(counts) >= 1, "a split is empty")
        for shard in self.shards:
            need(Path(shard.file).name == shard.file, f"{short(shard.file)} is no file beside it")
            need(shard.tokens >= 1, f"{shard.file} holds {shard.tokens} tokens")

    @property
    def fingerprint(self) -> str:
        """Of the tokens, whatever they are called and wherever they lie."""
        tokens = [(shard.split, shard.tokens, shard.sha256) for shard in self.shards]
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


class Tokens:
    """The tokens of one split, read by memory map across files. Pickles as its paths."""

    def __init__(self, files: Sequence[Path], dtype: str, vocab_size: int) -> None:
        self._files, self._dtype, self._vocab_size = files, dtype, vocab_size
        self._maps = [np.memmap(file, np.dtype(dtype), "r") for file in files]
        self._starts = list(accumulate((len(part) for part in self._maps), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[type[Tokens], tuple[Sequence[Path], str, int]]:
        return Tokens, (self._files, self._dtype, self._vocab_size)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64 of shape (stop - start,).

        Raises:
            IndexError: not 0 <= start <= stop <= len(self).
            DataError: a token id beyond the vocabulary.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        out = np.empty(stop - start, np.int64)
        first = bisect.bisect_right(self._starts, start) - 1
        held = zip(self._files[first:], self._maps[first:], self._starts[first:])
        for file, part, origin in held:
            if origin >= stop:
                break
            low, high = max(start, origin), min(stop, origin + len(part))
            out[low - start : high - start] = part[low - origin : high - origin]
            check_ids(out[low - start : high - start], self._vocab_size, str(file))
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
        return Tokens(files, self.manifest.dtype, self.manifest.vocab_size)


def open_shards(folder: str | os.PathLike[str], verify: bool = False) -> Shards:
    """Open what `tokenize_corpus` wrote; verify: hash each shard too, once.

    Raises:
        DataError: no such folder, another version, or files that are not the manifest's.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    check_links(folder)
    tokenizer = load_tokenizer(folder)
    if fingerprint(tokenizer) != manifest.tokenizer:
        raise DataError(
            f"{folder}: tokenizer.json is not the one that made these shards; "
            "put it back or tokenise the text again"
        )
    if vocabulary_size(tokenizer) > manifest.vocab_size:
        raise DataError(f"{folder}: manifest.json contradicts the tokenizer; {_AGAIN}")
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
                check_digest(file, shard.sha256, _AGAIN)
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}; tokenise the text again") from error
    for name in SPLITS:
        held = sum(shard.tokens for shard in manifest.shards if shard.split == name)
        if held != manifest.splits[name].tokens:
            raise DataError(f"{folder}: manifest.json contradicts itself; tokenise the text again")
    return Shards(folder, manifest, tokenizer)
