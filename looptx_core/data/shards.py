"""Tokenised corpora: written once and atomically, read by memory map.

A folder holds `tokenizer.json`, `manifest.json` and, for each split, `<split>-00000.bin` and so
on: little-endian token ids, documents one after the other, each followed by the end token.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer

from looptx_core.data.corpus import Corpus, Document, boundary, bundled_text
from looptx_core.data.tokenizer import (
    check_vocab_size,
    end_id,
    fingerprint,
    load_tokenizer,
    train_tokenizer,
)
from looptx_core.errors import DataError, LooptxError, UsageError

SCHEMA_VERSION = 1
SPLITS = ("train", "val")
VOCAB_SIZE = 4096
_FEW = 100  # documents; below it the split weighs bytes
_BATCH_CHARS = 1 << 20  # text encoded at a time

# Called with what is done ('read' or 'encode'), the bytes so far, and all bytes where known.
Progress = Callable[[str, int, int | None], None]


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
            facts["splits"] = {name: Counts(**facts["splits"][name]) for name in SPLITS}
            facts["split"] = Split(**facts["split"])
            facts["shards"] = [Shard(**shard) for shard in facts["shards"]]
            return cls(**facts)
        except (KeyError, TypeError) as error:
            raise DataError(f"{file}: damaged ({error}); tokenise the text again") from error


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


def tokenize_corpus(
    inputs: Sequence[str | os.PathLike[str]] | Corpus,
    out: str | os.PathLike[str],
    vocab_size: int = VOCAB_SIZE,
    tokenizer: Tokenizer | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    text_key: str = "text",
    overwrite: bool = False,
    shard_tokens: int = 2**26,
    on_progress: Progress | None = None,
) -> Manifest:
    """Learn a tokenizer (unless one is given), encode the inputs, and write a folder of shards.

    Equal inputs and settings give equal bytes. The folder appears whole or not at all.

    Args:
        inputs: as for `Corpus`, or one, which brings its own text key.
        vocab_size: of a tokenizer to learn; a given one has its own.
        val_fraction: the share of documents held out (of bytes where documents are few).
        shard_tokens: the most tokens in a file.
    Raises:
        UsageError: bad settings, or `out` exists and may not be replaced.
        DataError: bad or empty inputs, or too little text for `vocab_size`.
        LooptxError: `out` cannot be written.
    """
    if tokenizer is None:
        check_vocab_size(vocab_size)
    if not 0 < val_fraction < 1:
        raise UsageError(f"the validation share {val_fraction} must lie between 0 and 1")
    if shard_tokens < 1:
        raise UsageError(f"{shard_tokens} tokens a shard is too few; give at least 1")
    target = Path(out).resolve()
    _check_target(target, overwrite)
    progress = on_progress or _silent
    with inputs if isinstance(inputs, Corpus) else Corpus(inputs, text_key) as corpus:
        census = _Census(seed)
        if tokenizer is None:
            tokenizer = train_tokenizer(census.count(corpus, progress), vocab_size)
        else:
            for _ in census.count(corpus, progress):
                pass
        splitter = _Splitter(census, val_fraction)
        try:
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
            temporary.mkdir(parents=True)
            try:
                manifest = _write(
                    temporary, corpus, tokenizer, splitter, census.bytes, shard_tokens, progress
                )
                _replace(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            reason = error.strerror or error
            raise LooptxError(
                f"cannot write {target}: {reason}; free some space or choose another --out"
            ) from error
    return manifest


def cached_shards(
    inputs: Sequence[str | os.PathLike[str]],
    vocab_size: int = VOCAB_SIZE,
    tokenizer: Tokenizer | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    text_key: str = "text",
    on_progress: Progress | None = None,
) -> Path:
    """The folder of shards for raw text, tokenised at the first call and found again after.

    Its name is a hash of the inputs' content and the settings. Arguments and errors as for
    `tokenize_corpus`.
    """
    with Corpus(inputs, text_key) as corpus:
        vocabulary = fingerprint(tokenizer) if tokenizer else vocab_size
        settings = [SCHEMA_VERSION, corpus.digest(), vocabulary, val_fraction, seed, text_key]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
        folder = cache_folder() / "shards" / key
        if _opens(folder):
            return folder
        try:
            tokenize_corpus(
                corpus,
                folder,
                vocab_size,
                tokenizer,
                val_fraction,
                seed,
                overwrite=True,
                on_progress=on_progress,
            )
        except LooptxError:
            if not _opens(folder):  # else another process was faster
                raise
    return folder


def resolve_data(
    data: Sequence[str | os.PathLike[str]] | None,
    vocab_size: int = VOCAB_SIZE,
    tokenizer: Tokenizer | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    text_key: str = "text",
    on_progress: Progress | None = None,
) -> Path:
    """The folder of shards that `--data` means: itself, or raw text through the cache.

    Args:
        data: one folder of shards, or inputs as for `Corpus`; None is the bundled text.
        tokenizer: the one that the shards must have been made with, or will be.
    Raises:
        UsageError: shards mixed with other inputs.
        DataError: shards of another tokenizer; and as for `tokenize_corpus`.
    """
    inputs = list(data) if data is not None else [bundled_text()]
    folders = [Path(item) for item in inputs if (Path(item) / "manifest.json").is_file()]
    if not folders:
        return cached_shards(
            inputs, vocab_size, tokenizer, val_fraction, seed, text_key, on_progress
        )
    if len(inputs) > 1:
        raise UsageError(f"{folders[0]} is tokenised data; give it alone, or give raw text only")
    if tokenizer and Manifest.read(folders[0]).tokenizer != fingerprint(tokenizer):
        raise DataError(
            f"{folders[0]}: made with another tokenizer than the model's; "
            "tokenise the text again with the model's"
        )
    return folders[0]


def cache_folder() -> Path:
    """Where derived files are kept: `$LOOPTX_CACHE`, else looptx in the user's cache folder."""
    if own := os.environ.get("LOOPTX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "looptx"


def _opens(folder: Path) -> bool:
    try:
        open_shards(folder)
    except DataError:
        return False
    return True


def _silent(phase: str, done: int, total: int | None) -> None:
    """Report nothing."""


class _Census:
    """A first reading of the corpus: it checks every byte and counts."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.documents = 0
        self.bytes = 0
        self.chars = 0
        self.sizes: list[int] = []  # bytes, of the first _FEW documents
        self.lowest = (2.0, 0)  # the hash and number of the document first in hash order
        self.highest = (-1.0, 0)

    def count(self, corpus: Corpus, progress: Progress) -> Iterator[str]:
        """Pass the pieces on.

        Raises:
            DataError: no text, or too little to split.
        """
        for number, document in enumerate(corpus.documents()):
            before = self.bytes
            for piece in document.pieces:
                self.bytes += len(piece.encode())
                self.chars += len(piece)
                progress("read", self.bytes, None)
                yield piece
            self.documents += 1
            if number < _FEW:
                self.sizes.append(self.bytes - before)
            place = (_hash(self.seed, number), number)
            self.lowest = min(self.lowest, place)
            self.highest = max(self.highest, place)
        if self.chars < 2:  # one character cannot be split
            names = ", ".join(source.name for source in corpus.sources[:3])
            raise DataError(f"{names}: empty; give files that hold some text")


def _hash(seed: int, number: int) -> float:
    """A document's place in [0, 1), fixed by seed and number."""
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class _Splitter:
    """Gives each document, or the tail of the only one, to a split."""

    def __init__(self, census: _Census, val_fraction: float) -> None:
        self._census = census
        self._fraction = val_fraction
        self._few: set[int] = set()
        self._tail_at = 0  # bytes
        if census.documents == 1:
            rule, text = "tail", "one document: its tail is held out, cut before a whitespace"
            at = round(census.bytes * (1 - val_fraction))
            self._tail_at = min(max(at, 1), census.bytes - 1)
        elif census.documents < _FEW:
            rule, text = "few", "whole documents in hash order until the share of bytes is reached"
            self._few = self._hold_out_few()
        else:
            rule, text = "hash", "a document is held out if its hash in [0, 1) is below the share"
        self.documents = census.documents
        self.facts = Split(rule, text, val_fraction, census.seed)

    def assign(self, documents: Iterable[Document]) -> Iterator[tuple[str, str | None]]:
        """Yield (split, piece), and (split, None) where a document ends."""
        for number, document in enumerate(documents):
            if self._tail_at:
                split = "val"
                yield from self._cut_tail(document)
            else:
                split = "val" if self._held_out(number) else "train"
                for piece in document.pieces:
                    yield split, piece
            yield split, None

    def _held_out(self, number: int) -> bool:
        if self._few:
            return number in self._few
        # At least one document on each side.
        if number in (self._census.lowest[1], self._census.highest[1]):
            return number == self._census.lowest[1]
        return _hash(self._census.seed, number) < self._fraction

    def _hold_out_few(self) -> set[int]:
        sizes = self._census.sizes
        wanted = self._fraction * sum(sizes)
        chosen: set[int] = set()
        held = 0
        for number in sorted(range(len(sizes)), key=lambda n: _hash(self._census.seed, n)):
            if held >= wanted or len(chosen) + 1 == len(sizes):
                break
            if held + sizes[number] <= 2 * wanted:  # else too little would be left to train on
                chosen.add(number)
                held += sizes[number]
        return chosen or {sizes.index(min(sizes))}

    def _cut_tail(self, document: Document) -> Iterator[tuple[str, str | None]]:
        seen = 0
        for piece in document.pieces:
            raw = piece.encode()
            if seen <= self._tail_at < seen + len(raw):
                limit = len(raw[: self._tail_at - seen].decode(errors="ignore"))
                # Without the max, a first character of several bytes would leave no head.
                head = boundary(piece, 0, max(limit, 1)) if limit or not seen else 0
                if head:
                    yield "train", piece[:head]
                yield "train", None
                yield "val", piece[head:]
            else:
                yield ("train" if seen < self._tail_at else "val"), piece
            seen += len(raw)


class _Writer:
    """Appends tokens to the shards of one split."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int) -> None:
        self.shards: list[Shard] = []
        self.documents = self.bytes = self.tokens = 0
        self._folder, self._split, self._dtype = folder, split, np.dtype(dtype)
        self._limit = shard_tokens
        self._file: BinaryIO | None = None
        self._held = 0

    def append(self, ids: Sequence[int]) -> None:
        tokens = np.asarray(ids, self._dtype)
        self.tokens += len(tokens)
        while len(tokens):
            if self._file is None:
                name = f"{self._split}-{len(self.shards):05d}.bin"
                self._file = (self._folder / name).open("wb")
                self._digest = hashlib.sha256()
                self._held = 0
            part, tokens = np.split(tokens, [self._limit - self._held])
            data = part.tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._held += len(part)
            if self._held == self._limit:
                self.close()

    def close(self) -> None:
        """End the current shard, on the disk for good."""
        if self._file is None:
            return
        file, self._file = self._file, None
        with file:
            file.flush()
            os.fsync(file.fileno())
        name = Path(file.name).name
        self.shards.append(Shard(name, self._split, self._held, self._digest.hexdigest()))

    @property
    def counts(self) -> Counts:
        return Counts(self.documents, self.bytes, self.tokens)


def _write(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    splitter: _Splitter,
    total: int,
    shard_tokens: int,
    progress: Progress,
) -> Manifest:
    """Fill an empty folder; the manifest comes last."""
    vocab_size = max(tokenizer.get_vocab().values()) + 1  # ids may have holes
    dtype = "<u2" if vocab_size <= 2**16 else "<u4"
    end = end_id(tokenizer)
    writers = {split: _Writer(folder, split, dtype, shard_tokens) for split in SPLITS}
    done = 0
    for batch in _batches(splitter.assign(corpus.documents())):
        pieces = [piece for _, piece in batch if piece is not None]
        encoded = iter(tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
        for split, piece in batch:
            writer = writers[split]
            if piece is None:
                writer.append([end])
                writer.documents += 1
            else:
                writer.append(next(encoded).ids)
                writer.bytes += len(piece.encode())
                done += len(piece.encode())
        progress("encode", done, total)
    if done != total:
        raise DataError("the inputs changed while they were read; run it again")
    for writer in writers.values():
        writer.close()
    tokens = sum(writer.tokens for writer in writers.values())
    manifest = Manifest(
        documents=splitter.documents,
        bytes=total,
        tokens=tokens,
        bytes_per_token=total / tokens,
        vocab_size=vocab_size,
        dtype=dtype,
        end_id=end,
        tokenizer=fingerprint(tokenizer),
        splits={split: writer.counts for split, writer in writers.items()},
        split=splitter.facts,
        shards=[shard for writer in writers.values() for shard in writer.shards],
        inputs=[{"name": source.name, "bytes": source.size} for source in corpus.sources],
    )
    # By our own hand, for the library's `save` raises no OSError when the disk is full.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
    text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False)
    (folder / "manifest.json").write_text(text + "\n", "utf-8")
    return manifest


def _batches(
    pieces: Iterable[tuple[str, str | None]],
) -> Iterator[list[tuple[str, str | None]]]:
    batch: list[tuple[str, str | None]] = []
    size = 0
    for split, piece in pieces:
        batch.append((split, piece))
        size += len(piece or "") + 1
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise UsageError unless `target` is free, or holds shards and may be replaced."""
    try:
        held = sorted(file.name for file in target.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(
            f"{target}: not a folder to write to ({error.strerror}); choose another --out"
        ) from error
    if held and not overwrite:
        raise UsageError(f"{target} exists; choose another --out or pass --overwrite")
    ours = {"tokenizer.json", "manifest.json", "probes.jsonl"}
    if foreign := [name for name in held if name not in ours and not _is_shard(name)]:
        raise UsageError(
            f"{target} holds {foreign[0]}, which is no tokenised data; choose another --out"
        )


def _is_shard(name: str) -> bool:
    return name.endswith(".bin") and name.startswith(tuple(f"{split}-" for split in SPLITS))


def _replace(new: Path, target: Path) -> None:
    """Put the finished folder in its place; an old one is removed only once it is there."""
    old = new.with_suffix(".old")
    try:
        target.replace(old)
    except FileNotFoundError:
        new.replace(target)
        return
    try:
        new.replace(target)
    except OSError:
        old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
