"""Text to shards: a tokenizer learnt, documents split, encoded, and written once and atomically."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer

from looptx_core.atomic import put_in_place, temporary_beside
from looptx_core.config.ranges import check_range
from looptx_core.data.corpus import Corpus
from looptx_core.data.shards import SPLITS, Counts, Manifest, Shard
from looptx_core.data.split import Census, Progress, Splitter
from looptx_core.data.tokenizer import (
    check_vocab_size,
    end_id,
    fingerprint,
    train_tokenizer,
    vocabulary_size,
)
from looptx_core.errors import DataError, LooptxError, remedy
from looptx_core.outputs import check_output

VOCAB_SIZE = 4096
_BATCH_CHARS = 1 << 20  # text encoded at a time


def tokenize_corpus(
    inputs: Sequence[str | os.PathLike[str]] | Corpus,
    out: str | os.PathLike[str],
    vocab_size: int = VOCAB_SIZE,
    tokenizer: Tokenizer | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    text_key: str = "text",
    overwrite: bool = False,
    check: bool = True,
    shard_tokens: int = 2**26,
    on_progress: Progress | None = None,
) -> Manifest:
    """Learn a tokenizer (unless one is given), encode the inputs, and write a folder of shards.

    Equal inputs and settings give equal bytes. The folder appears whole or not at all.

    Args:
        inputs: as for `Corpus`, or one, which brings its own text key.
        vocab_size: of a tokenizer to learn; a given one has its own.
        val_fraction: the share of documents held out (of bytes where documents are few).
        overwrite: replace shards that are there; nothing else is ever replaced.
        check: whether to look at what is there; the cache owns its folders and does not.
        shard_tokens: the most tokens in a file.
    Raises:
        UsageError: bad settings, or `out` exists and may not be replaced.
        DataError: bad or empty inputs, or too little text for `vocab_size`.
        LooptxError: `out` cannot be written.
    """
    if tokenizer is None:
        check_vocab_size(vocab_size)
    check_range("val_fraction", val_fraction)
    check_range("shard_tokens", shard_tokens)
    target = Path(out).resolve()
    if check:
        check_output(target, "tokenize", overwrite=overwrite)
    progress = on_progress or _silent
    with inputs if isinstance(inputs, Corpus) else Corpus(inputs, text_key) as corpus:
        census = Census(seed)
        if tokenizer is None:
            tokenizer = train_tokenizer(census.count(corpus, progress), vocab_size)
        else:
            for _ in census.count(corpus, progress):
                pass
        splitter = Splitter(census, val_fraction)
        try:
            temporary = temporary_beside(target)
            temporary.mkdir(parents=True)
            try:
                manifest = _write(
                    temporary, corpus, tokenizer, splitter, census.bytes, shard_tokens, progress
                )
                put_in_place(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            reason = error.strerror or error
            raise LooptxError(f"cannot write {target}: {reason}; {remedy(error)}") from error
    return manifest


def _silent(phase: str, done: int, total: int | None) -> None:
    """Report nothing."""


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
    splitter: Splitter,
    total: int,
    shard_tokens: int,
    progress: Progress,
) -> Manifest:
    """Fill an empty folder; the manifest comes last."""
    vocab_size = vocabulary_size(tokenizer)
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
    document = asdict(manifest) | {"command": "tokenize"}
    text = json.dumps(document, indent=2, ensure_ascii=False)
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
