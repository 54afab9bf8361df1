"""Readers that stream text out of files, folders, globs and standard input.

A document comes as pieces of at most 64 Ki characters, so memory stays bounded however long the
document or its lines are. Pieces are cut just before a whitespace that follows something else: no
pre-token of a GPT-2 style regex spans such a place, so the tokens of the pieces, joined, are the
tokens of the whole.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import importlib.resources
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from looptx_core.data.tables import CHUNK, KINDS, Source, decoded, rows, texts
from looptx_core.documents import arriving, check_inside, open_input
from looptx_core.errors import DataError, LooptxError, MissingError, remedy
from looptx_core.machine.scratch import scratch_folder
from looptx_core.media.registry import media_of_file

PIECE = CHUNK  # the most characters in a piece
# Only ASCII whitespace starts a piece: Python and the tokenizer's regex agree on it.
_BOUNDARY = re.compile(r"[\s\S]+(?<=\S)(?=[ \t\n\r])")
_HUB = "hf:"  # what a name for the package datasets begins with


class Document(NamedTuple):
    """A named stream of text pieces; read it before asking for the next document."""

    name: str
    pieces: Iterator[str]


def bundled_text() -> Path:
    """The public-domain text that ships with the package."""
    return Path(str(importlib.resources.files("looptx_core").joinpath("assets", "moby-dick.txt")))


def boundary(text: str, start: int, stop: int) -> int:
    """The last place in (start, stop] to cut `text` without changing tokens, else `stop`."""
    match = _BOUNDARY.match(text, start, stop + 1)
    return match.end() if match else stop


def cut_pieces(chunks: Iterable[str], limit: int = PIECE) -> Iterator[str]:
    """Re-cut a stream of text into pieces of at most `limit` characters, at boundaries.

    The pieces depend on the text alone, not on how it came in chunks.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > limit:
            end = boundary(rest, start, start + limit)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


class Corpus:
    """Inputs that can be read several times; a context manager, for standard input is spooled.

    Args:
        inputs: files, folders (all visible files below, sorted), globs, '-', or
            hf:NAME[@CONFIG][:SPLIT], a data set's name for the package datasets.
        text_key: the key or column that holds the text in JSON lines and Parquet.
    Raises:
        DataError: an input is missing, matches nothing or cannot be read.
    """

    def __init__(self, inputs: Sequence[str | os.PathLike[str]], text_key: str = "text") -> None:
        self.text_key = text_key
        self._spool: Path | None = None
        self._held = contextlib.ExitStack()
        try:
            found = chain.from_iterable(self._resolve(os.fspath(item)) for item in inputs)
            # A file that is named twice counts once, lest it end up on both sides of a split.
            self.sources = list({source.path.resolve(): source for source in found}.values())
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise _unreadable(error.filename or "input", error) from error
            raise
        if not self.sources:
            raise DataError("no input given: name text files, folders or '-' for standard input")

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was spooled."""
        self._held.close()

    def documents(self) -> Iterator[Document]:
        """Every document that holds any text, in order.

        Raises:
            DataError: bad UTF-8, JSON or Parquet, naming file and place.
        """
        for source in self.sources:
            try:
                for pieces in self._read(source):
                    first = next(pieces, None)
                    if first is not None:
                        yield Document(source.name, chain([first], pieces))
            except OSError as error:
                raise _unreadable(source.name, error) from error

    def records(self) -> Iterator[tuple[str, Any]]:
        """Where each record stands, and what it is: an object of JSON lines, a row of Parquet,
        or {"text": ...} of a plain text.

        Raises:
            DataError: an input cannot be read.
        """
        for source in self.sources:
            yield from self.records_of(source)

    def records_of(self, source: Source) -> Iterator[tuple[str, Any]]:
        """`records` of one of the sources; a key whose value is null is as if it were absent."""
        try:
            if source.kind == "text":
                yield source.name, {"text": "".join(decoded(source))}
            else:
                yield from rows(source)
        except OSError as error:
            raise _unreadable(source.name, error) from error

    def digest(self) -> str:
        """SHA-256 of what the inputs hold, in order, whatever they are called."""
        total = hashlib.sha256()
        for source in self.sources:
            try:
                with open_input(source.path) as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise _unreadable(source.name, error) from error
            total.update(f"{source.kind} {content}\n".encode())
        return total.hexdigest()

    def _resolve(self, item: str) -> Iterator[Source]:
        path = Path(item)
        if item.startswith(_HUB):
            yield self._downloaded(item)
        elif item == "-":
            yield self._spooled(None, "standard input")
        elif path.is_dir():
            yield from _sources(visible_files(path), f"{item}: the folder holds no files")
        elif path.is_file():
            yield from _sources([path], item)
        elif path.exists():  # a pipe or the like, which can be read only once
            yield self._spooled(path, item)
        elif glob.has_magic(item):
            matches = sorted(glob.glob(item, recursive=True))  # noqa: PTH207, it may be absolute
            files = [Path(match) for match in matches if Path(match).is_file()]
            yield from _sources(files, f"{item}: the pattern matches no files; check its spelling")
        else:
            raise DataError(f"{item}: no such file or folder; check the path")

    def _spooled(self, path: Path | None, name: str) -> Source:
        try:
            self._spool = self._spool or self._held.enter_context(scratch_folder())
            copy = self._spool / hashlib.sha256(name.encode()).hexdigest()
            if not copy.exists():
                given = open_input(path) if path else contextlib.nullcontext(sys.stdin.buffer)
                with given as stream, copy.open("wb") as target:
                    target.writelines(arriving(stream))
            return Source(copy, name, "text", copy.stat().st_size)
        except OSError as error:
            raise _unreadable(name, error) from error

    def _downloaded(self, item: str) -> Source:
        """The rows of a data set of the package datasets, as JSON lines."""
        try:
            import datasets
        except ImportError as error:
            raise MissingError(
                f"{item}: the package datasets is not installed; pip install datasets, "
                "or give files"
            ) from error
        name, _, split = item.removeprefix(_HUB).partition(":")
        name, _, config = name.partition("@")
        self._spool = self._spool or self._held.enter_context(scratch_folder())
        copy = self._spool / f"{hashlib.sha256(item.encode()).hexdigest()}.jsonl"
        try:
            rows = datasets.load_dataset(
                name, config or None, split=split or "train", streaming=True
            )
            with copy.open("w", encoding="utf-8") as target:
                for row in rows:
                    target.write(json.dumps(row, default=str) + "\n")
        except OSError as error:
            raise _unreadable(item, error) from error
        except Exception as error:  # the library raises many kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{item}: cannot be loaded ({reason}); check its name") from error
        return Source(copy, item, "jsonl", copy.stat().st_size)

    def _read(self, source: Source) -> Iterator[Iterator[str]]:
        if source.kind == "text":
            return iter([cut_pieces(decoded(source))])
        return (cut_pieces([text]) for text in texts(source, self.text_key))


def documents(
    inputs: Sequence[str | os.PathLike[str]], text_key: str = "text"
) -> Iterator[Document]:
    """The documents of `inputs`, streamed once; see `Corpus`."""
    with Corpus(inputs, text_key) as corpus:
        yield from corpus.documents()


def _unreadable(name: str, error: OSError) -> LooptxError:
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.EFBIG):
        return LooptxError(f"{name}: {error.strerror}; {remedy(error)}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):  # while spooling
        folder = tempfile.gettempdir()
        return LooptxError(f"{name}: no space left in {folder} for a copy; set TMPDIR elsewhere")
    return DataError(f"{name}: cannot be read ({error.strerror or error}); check the file")


def visible_files(folder: Path) -> list[Path]:
    """Files below `folder`, sorted, without hidden ones and hidden folders.

    Raises `DataError` for a link that leads out of the folder.
    """
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files if not name.startswith(".")]
    for file in found:
        if file.is_symlink():
            check_inside(file, folder)
    return sorted(file for file in found if file.is_file())


def _sources(files: Sequence[Path], if_none: str) -> Iterator[Source]:
    if not files:
        raise DataError(if_none)
    for file in files:
        if medium := media_of_file(file):
            raise DataError(
                f"{file}: a {medium.noun}; {medium.plural} with their texts are not tokenised "
                "ahead, give them to looptx train --data as they are"
            )
        kind = KINDS.get(file.suffix.lower(), "text")
        yield Source(file, str(file), kind, file.stat().st_size)
