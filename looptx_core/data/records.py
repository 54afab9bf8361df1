"""Records: the one grammar of training data, for pretraining pairs, finetuning and chats.

    {"text": ...}                                  a text, or a list of texts that say the same;
                                                   empty beside an item in which nothing is said
    {"prompt": ..., "response": ...}
    {"messages": [{"role": ..., "content": ...}, ...]}
    {"parts": [{"text": ...}, {"image": path}, ...]}

Alpaca's {"instruction", "input", "output"} and ShareGPT's {"conversations": [{"from", "value"}]}
are read as a prompt with its response and as messages.

Each may name items of media by the medium's key, a path or several: `image` of a record, or of a
message. An item stands where its marker, such as `<|image|>`, is written, or before the text. A
part under a medium's write key is an item that the model learns to write. `group` names what the
record is held out with. A folder with X.png beside X.txt is as good as a file of records. Paths
are relative to the file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from looptx_core.config.finetune import parse_columns
from looptx_core.data.chat import check_messages
from looptx_core.data.content import insert_items
from looptx_core.data.corpus import Corpus, visible_files
from looptx_core.documents import check_characters, is_one_of, read_text
from looptx_core.errors import DataError, UsageError
from looptx_core.media.base import Medium
from looptx_core.media.registry import MEDIA, media_of_file

_FORMS = '{"prompt", "response"}, {"messages"} or {"text"}'


class MediaFile(NamedTuple):
    """An item of a medium in a record, not decoded yet."""

    medium: str
    path: Path
    written: bool = False
    """Whether the model learns to write it, rather than reads it."""

    @property
    def identity(self) -> tuple[str, str, int, bool]:
        """The medium, the file's name and its size in bytes, wherever it lies, and the use."""
        return self.medium, self.path.name, self.path.stat().st_size, self.written


Part = MediaFile | tuple[str, ...]
"""An item, or texts that say the same; one of them is drawn in each epoch."""


class Turn(NamedTuple):
    """A stretch of a record: a whole text, a prompt, a response or a message."""

    content: tuple[Part, ...]
    role: str = ""
    """Of a message; '' elsewhere."""


@dataclass(frozen=True)
class Record:
    """A record that was read: what it holds, and where it stands, for messages."""

    where: str
    form: Literal["text", "prompt", "messages"]
    turns: tuple[Turn, ...]
    group: str | None = None

    @property
    def files(self) -> tuple[MediaFile, ...]:
        """Its items, in order."""
        return tuple(p for turn in self.turns for p in turn.content if isinstance(p, MediaFile))

    @property
    def has_text(self) -> bool:
        parts = (part for turn in self.turns for part in turn.content)
        return any(not isinstance(part, MediaFile) and any(part) for part in parts)


@dataclass
class Records:
    """What was read, and how many records were left out."""

    records: list[Record] = field(default_factory=list)
    skipped: int = 0

    @property
    def media(self) -> list[Medium]:
        """The media that are named, in the registry's order."""
        named = {file.medium for record in self.records for file in record.files}
        return [medium for name, medium in MEDIA.items() if name in named]

    @property
    def fingerprint(self) -> str:
        """Of the texts and of the items' names and sizes, wherever they lie."""
        digest = hashlib.sha256()
        for record in self.records:
            turns = [
                (turn.role, [p.identity if isinstance(p, MediaFile) else p for p in turn.content])
                for turn in record.turns
            ]
            digest.update(json.dumps([record.form, record.group, turns]).encode())
        return digest.hexdigest()


def read_records(inputs: Sequence[str | Path], skip_bad: bool = False) -> Records:
    """Read records of media with texts; files are looked for and not opened yet.

    skip_bad: leave out, and count, records that can't be used.
    Raises `DataError` for a record without an item or without a text, or with a missing file.
    """
    found = Records()
    for where, folder, raw in raw_records(inputs):
        try:
            found.records.append(_with_media(raw, where, folder))
        except DataError:
            if not skip_bad:
                raise
            found.skipped += 1
    if not found.records:
        nouns = " or ".join(medium.plural for medium in MEDIA.values())
        where = ", ".join(map(str, inputs))
        raise DataError(f"{where}: no {nouns} with texts; see docs/how-to/images.md")
    return found


def raw_records(inputs: Sequence[str | Path]) -> Iterator[tuple[str, Path, Any]]:
    """Where each record stands, the folder where its paths start, and what was written."""
    for is_folder, some in itertools.groupby(inputs, lambda item: bool(_media_files(Path(item)))):
        if is_folder:
            for folder in some:
                yield from _folder(Path(folder))
            continue
        with Corpus(list(some)) as corpus:
            for source in corpus.sources:
                for where, record in corpus.records_of(source):
                    yield where, source.folder, record


def media_named(inputs: Sequence[str | Path]) -> frozenset[str]:
    """The media that folders hold, or that the first record of a file names.

    Inputs that can be read only once are not looked at, and faults are left to their reader.
    """
    found: set[str] = set()
    for item in map(Path, inputs):
        files = _media_files(item)
        found |= {medium.name for file in files if (medium := media_of_file(file))}
        if files or not (item.is_file() or item.is_dir()):
            continue
        try:
            with Corpus([item]) as corpus:
                for source in corpus.sources:
                    if source.kind != "text":
                        _, record = next(corpus.records_of(source), ("", None))
                        found |= _named(record)
        except DataError:
            continue
    return frozenset(found)


def parse(record: Any, where: str, folder: Path) -> Record:
    """A record from what was written. folder: where its paths start.

    Raises `DataError` for a record of another form, with half a surrogate pair or with a missing
    file.
    """
    check_characters(record, where, mend="mend it, or pass `skip_bad`")
    record = _in_our_form(record, where)
    group = record.get("group") if isinstance(record, dict) else None
    form: Literal["text", "prompt", "messages"]
    match record:
        case {"messages": messages}:
            check_messages(messages, where)
            files = [_files(message, where, folder) for message in messages]
            files[0] = _files(record, where, folder) + files[0]
            turns = [
                Turn(_content(message["content"], some, where), message["role"])
                for message, some in zip(messages, files)
            ]
            form = "messages"
        case {"prompt": str(prompt), "response": str(response)}:
            files_ = _files(record, where, folder)
            turns = [Turn(_content(prompt, files_, where)), Turn(_content(response, (), where))]
            form = "prompt"
        case {"parts": [*parts]}:
            turns, form = [Turn(tuple(_part(part, where, folder) for part in parts))], "text"
        case {"text": str(text)}:
            files_ = _files(record, where, folder)
            turns = [Turn(_content(text.strip() if files_ else text, files_, where))]
            form = "text"
        case {"text": [*texts]} if _are_texts(texts, or_empty=bool(_named(record))):
            files_ = _files(record, where, folder)
            turns, form = [Turn((*files_, tuple(text.strip() for text in texts)))], "text"
        case dict():
            has = ", ".join(f"{key}: {type(value).__name__}" for key, value in record.items())
            raise DataError(
                f"{where}: a record needs {_FORMS}, all of text; it has {has or 'no key'}"
            )
        case _:
            raise DataError(f"{where}: {type(record).__name__} is no record; write {_FORMS}")
    return Record(where, form, tuple(turns), str(group) if group is not None else None)


_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
}
"""The roles of ShareGPT's records, by what `from` says."""


def _in_our_form(record: Any, where: str) -> Any:
    """A record of Alpaca's or ShareGPT's keys by ours; any other as it is.

    Raises `DataError` for a conversation whose turns can't be told apart.
    """
    match record:
        case {"instruction": str(instruction), "output": str(output)} if "prompt" not in record:
            more = record.get("input")
            if more is not None and not isinstance(more, str):
                raise DataError(f"{where}: input must be text; mend this record")
            asked = "\n\n".join(text for text in (instruction, more) if text)
            return {**record, "prompt": f"{asked}\n\n", "response": output}
        case {"conversations": [*turns]} if "messages" not in record:
            for turn in turns:
                if not isinstance(turn, dict) or not is_one_of(turn.get("from"), _SPEAKERS):
                    raise DataError(
                        f"{where}: a turn of conversations needs a value of text and a from of "
                        f"{', '.join(_SPEAKERS)}; mend this record"
                    )
            messages = [
                {**turn, "role": _SPEAKERS[turn["from"]], "content": turn.get("value")}
                for turn in turns
            ]
            return {**record, "messages": messages}
    return record


def rename_columns(record: Any, columns: Sequence[str], where: str) -> Any:
    """A record whose columns are called by the keys of our forms.

    columns: as `config.finetune.parse_columns` reads them. Raises `DataError` for an absent column.
    """
    if not columns or not isinstance(record, dict):
        return record
    named = parse_columns(columns)
    if missing := [column for column in named.values() if column not in record]:
        has = ", ".join(map(str, record)) or "none"
        raise DataError(
            f"{where}: no column {', '.join(missing)}, which `columns` names; it has {has}"
        )
    left = {key: value for key, value in record.items() if key not in named.values()}
    return left | {key: record[column] for key, column in named.items()}


def _with_media(raw: Any, where: str, folder: Path) -> Record:
    """A record that has an item and a text."""
    record = None
    match raw:
        case {"messages": _} | {"prompt": _} | {"parts": _}:
            record = parse(raw, where, folder)
        case {"text": texts} if _are_texts(texts, or_empty=True):
            record = parse(raw, where, folder)
    silent = record is not None and raw.get("text") in ("", [""])
    if record is None or not record.files or not (record.has_text or silent):
        medium = MEDIA[min(_named(raw) or {next(iter(MEDIA))})]
        raise DataError(
            f'{where}: needs a {medium.noun} and a text, as {{"{medium.name}": path, '
            '"text": ...}; mend it, or pass `skip_bad`'
        )
    return record


def _content(text: str, files: tuple[MediaFile, ...], where: str) -> tuple[Part, ...]:
    try:
        parts = insert_items(text, files)
    except UsageError as error:
        raise DataError(f"{where}: {error}") from error
    return tuple((part,) if isinstance(part, str) else part for part in parts)


def _part(part: Any, where: str, folder: Path) -> Part:
    if isinstance(part, dict):
        match part.get("text"):
            case str(text):
                return (text.strip(),)
            case [*texts] if _are_texts(texts):
                return tuple(text.strip() for text in texts)
        for medium in MEDIA.values():
            for key, written in ((medium.name, False), (medium.write_key, True)):
                if key is not None and isinstance(part.get(key), str):
                    return _found(medium, part[key], where, folder, written)
    keys = " or ".join(f'{{"{name}": path}}' for name in MEDIA)
    raise DataError(f'{where}: a part is {keys} or {{"text": ...}}; mend it')


def _files(record: Any, where: str, folder: Path) -> tuple[MediaFile, ...]:
    found: tuple[MediaFile, ...] = ()
    for name, medium in MEDIA.items():
        named = record.get(name) if isinstance(record, dict) else None
        paths = [named] if isinstance(named, str) else named or []
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise DataError(f"{where}: {name} must be a path or several; mend this record")
        found += tuple(_found(medium, path, where, folder) for path in paths)
    return found


def _found(medium: Medium, path: str, where: str, folder: Path, written: bool = False) -> MediaFile:
    if not (folder / path).is_file():
        raise DataError(f"{where}: no {medium.noun} {path}; mend the path, or pass `skip_bad`")
    return MediaFile(medium.name, folder / path, written)


def _named(record: Any) -> set[str]:
    """The media that a record, its messages or its parts name."""
    if not isinstance(record, dict):
        return set()
    holders = [record]
    for key in ("messages", "parts"):
        inner = record.get(key)
        holders += [part for part in (inner if isinstance(inner, list) else []) if part]
    return {
        name
        for name, medium in MEDIA.items()
        for part in holders
        if isinstance(part, dict) and (part.get(name) or part.get(medium.write_key or name))
    }


def _are_texts(texts: Any, or_empty: bool = False) -> bool:
    """Whether this is a text or several. or_empty: one of no characters is a text too."""
    if isinstance(texts, str):
        texts = [texts]
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        return False
    return all(text.strip() or (or_empty and not text) for text in texts)


def _media_files(folder: Path) -> list[Path]:
    """The visible media below a folder, sorted; none for what is no folder."""
    if not folder.is_dir():
        return []
    return [file for file in visible_files(folder) if media_of_file(file)]


_TEXTS = {".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"}


def _folder(folder: Path) -> Iterator[tuple[str, Path, Any]]:
    files = _media_files(folder)
    texts = {file.with_suffix(".txt") for file in files}
    left = [f for f in visible_files(folder) if f.suffix.lower() in _TEXTS and f not in texts]
    if left:
        medium = media_of_file(files[0])
        assert medium is not None
        raise DataError(
            f"{folder}: holds {medium.plural}, and {left[0].name}, which is no text of one of "
            "them; give texts and files of records as a `data` of their own, elsewhere"
        )
    for file in files:
        medium, text = media_of_file(file), file.with_suffix(".txt")
        assert medium is not None
        words = read_text(text, mend="convert it").strip() if text.exists() else None
        yield str(file), file.parent, {medium.name: str(file.resolve()), "text": words}
