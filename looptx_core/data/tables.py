"""Files of text and of records, read a piece or a record at a time.

.jsonl, .ndjson    one JSON object a line
.json              an array of objects, or one object a line
.csv, .tsv         a first row with the names of the columns
.parquet           columns by name
anything else      plain text
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from looptx_core.documents import has_half, known_kind, open_input, parse_json, read_text
from looptx_core.errors import DataError

CHUNK = 1 << 16  # bytes read at a time
RECORD_LIMIT = 200 << 20
"""The most bytes in one record, which must be parsed in one go."""
MOST_EXPANSION = 10_000
"""How many times its own size a Parquet file may unfold to, beyond the first 256 MiB."""
_FREE = 256 << 20
_BATCH_BYTES = 16 << 20  # about as much of a Parquet column is decoded at a time
KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet",
}  # fmt: skip
"""By a file's ending; others are text."""
T = TypeVar("T")
_INVALID = "invalid UTF-8 at byte {}; convert the file to UTF-8 or name the text files by a glob"
_ONE_A_LINE = "write one object a line"
_MEND = "mend or drop this record"


class Source(NamedTuple):
    """One input file: where its bytes are, what the user calls it, and how to read it."""

    path: Path
    name: str
    kind: str
    """text, jsonl, json, csv or parquet."""
    size: int
    """Bytes."""

    @property
    def folder(self) -> Path:
        """Where the paths in it start: beside it, or here for what has no place of its own."""
        return self.path.parent if str(self.path) == self.name else Path()


def rows(source: Source) -> Iterator[tuple[str, Any]]:
    """Where each record stands, and its values by key; keys of null are left out."""
    reader = {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows}.get(source.kind)
    for where, record in (reader or _parquet_rows)(source):
        if isinstance(record, dict):
            record = {key: value for key, value in record.items() if value is not None}
        yield where, record


def texts(source: Source, key: str) -> Iterator[str]:
    """The text under `key` of each record. Raises `DataError` where there is none."""
    if source.kind == "parquet":
        yield from _parquet_texts(source, key)
    elif source.kind == "jsonl":
        yield from _lines(source, lambda line, where: _text(_json(line, where), key, where))
    else:
        reader = _json_rows if source.kind == "json" else _csv_rows
        for where, record in reader(source):
            yield _text(record, key, where)


def decoded(source: Source) -> Iterator[str]:
    """The text of a file, a chunk at a time, byte for byte except for a leading BOM."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, first = 0, b""
    with open_input(source.path) as file:
        while True:
            raw = file.read(CHUNK)
            first = first or raw
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise _not_text(source.name, offset - pending + error.start, first) from error
            yield text if offset else text.removeprefix("\ufeff")
            if not raw:
                return
            offset += len(raw)


def _not_text(where: str, at: int, first: bytes) -> DataError:
    kind = known_kind(first)
    return DataError(f"{where}: {f'this is {kind}' if kind else _INVALID.format(at)}")


def _lines(source: Source, parse: Callable[[str, str], T]) -> Iterator[T]:
    """`parse` of each line that is not blank, and of where it stands."""
    offset = number = 0
    with open_input(source.path) as file:
        while raw := file.readline(RECORD_LIMIT + 1):
            number += 1
            where = f"{source.name}, line {number}"
            if len(raw) > RECORD_LIMIT:
                most = RECORD_LIMIT >> 20
                raise DataError(f"{where}: longer than {most} MiB; give such text as a .txt file")
            start, offset = offset, offset + len(raw)
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                first = b"" if start else raw
                raise _not_text(where, start + error.start, first) from error
            del raw  # a line may be huge: hold it once
            if start == 0:
                line = line.removeprefix("\ufeff")
            if line.isspace() or not line:
                continue
            parsed = parse(line, where)
            del line
            yield parsed
            del parsed


def _json(line: str, where: str) -> Any:
    return parse_json(line, where, mend=_ONE_A_LINE, any_number=True)


def _jsonl_rows(source: Source) -> Iterator[tuple[str, Any]]:
    return _lines(source, lambda line, where: (where, _json(line, where)))


def _json_rows(source: Source) -> Iterator[tuple[str, Any]]:
    """The items of an array, or one object a line, as many programs write under this name."""
    with open_input(source.path) as file:
        first = file.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first != b"[":
        yield from _jsonl_rows(source)
        return
    text = read_text(source.path, mend="make it JSON lines by jq -c '.[]'")
    array = parse_json(text, source.name, mend="mend it", any_number=True)
    del text
    for number, record in enumerate(array, start=1):
        yield f"{source.name}, item {number}", record


def _csv_rows(source: Source) -> Iterator[tuple[str, Any]]:
    delimiter = "\t" if source.name.lower().endswith(".tsv") else ","
    csv.field_size_limit(RECORD_LIMIT)
    reader = csv.reader(_csv_lines(source), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        if not any(names) or len(set(names)) < len(names):
            raise DataError(
                f"{source.name}: the first row must name the columns, each once; add such a row"
            )
        for values in reader:
            where = f"{source.name}, line {reader.line_num}"
            if not values:
                continue
            if len(values) != len(names):
                raise DataError(f"{where}: {len(values)} values for {len(names)} columns; {_MEND}")
            yield where, dict(zip(names, values))
    except csv.Error as error:
        raise DataError(
            f"{source.name}, line {reader.line_num}: not valid CSV ({error}); {_MEND}"
        ) from error


def _csv_lines(source: Source) -> Iterator[str]:
    rest = ""
    for chunk in decoded(source):
        *whole, rest = (rest + chunk).split("\n")
        yield from (line + "\n" for line in whole)
        if len(rest) > RECORD_LIMIT:
            raise DataError(f"{source.name}: a line of over {RECORD_LIMIT >> 20} MiB; cut it")
    if rest:
        yield rest


def _text(record: Any, key: str, where: str) -> str:
    if not isinstance(record, dict) or key not in record:
        raise DataError(f"{where}: no key '{key}'; name the text's key with `text_key`")
    return _checked(record[key], key, where)


def _checked(text: object, key: str, where: str) -> str:
    if not isinstance(text, str):
        kind = type(text).__name__
        raise DataError(f"{where}: '{key}' is {kind}, not text; {_MEND}")
    if has_half(text):
        raise DataError(f"{where}: '{key}' holds half a surrogate pair; {_MEND}")
    return text


def _parquet_texts(source: Source, key: str) -> Iterator[str]:
    import pyarrow as pa  # here, since it takes a while to import
    import pyarrow.parquet as pq

    held = _Expansion(source)
    try:
        schema = pq.read_schema(source.path)
        if key not in schema.names:
            names = ", ".join(schema.names)
            raise DataError(f"{source.name}: no column '{key}' for `text_key`; there are: {names}")
        # As a dictionary: one long value that a small file repeats is held once.
        repeats = [key] if pa.types.is_string(schema.field(key).type) else None
        with pq.ParquetFile(
            source.path, buffer_size=1 << 20, pre_buffer=False, read_dictionary=repeats
        ) as file:
            held.check_metadata(file.metadata)
            row = 0
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                columns = (facts.column(place) for place in range(facts.num_columns))
                sizes = [c.total_uncompressed_size for c in columns if c.path_in_schema == key]
                most = _BATCH_BYTES * facts.num_rows // max(sum(sizes), 1)
                most = max(1, min(4096, most))
                batches = file.iter_batches(most, row_groups=[group], columns=[key])
                for value in (value for batch in batches for value in batch.column(0)):
                    row += 1
                    text = _parquet_text(value, key, f"{source.name}, row {row}")
                    held.add(len(text))
                    yield text
    except pa.ArrowException as error:
        raise _no_parquet(source, error) from error


def _parquet_rows(source: Source) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    held = _Expansion(source)
    number = 0
    try:
        with pq.ParquetFile(source.path, pre_buffer=False) as file:
            held.check_metadata(file.metadata)
            for batch in file.iter_batches(64):
                for row in batch.to_pylist():
                    number += 1
                    held.add(_size(row))
                    yield f"{source.name}, row {number}", row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _no_parquet(source, error) from error


def _size(value: Any) -> int:
    """Roughly the bytes that a row holds."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str | bytes) else 1


class _Expansion:
    """Keeps count of what a Parquet file unfolds to: repeats cost it nothing, and us all."""

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.most = _FREE + MOST_EXPANSION * source.size
        self.held = 0

    def check_metadata(self, metadata: Any) -> None:
        self.add(metadata.num_rows * max(1, metadata.num_columns), keep=False)

    def add(self, count: int, keep: bool = True) -> None:
        if self.held + count > self.most:
            raise DataError(
                f"{self.name}: unfolds to over {self.most:,} bytes, {MOST_EXPANSION:,} times its "
                "size; write it again without so many repeats, or as text"
            )
        self.held += count * keep


def _no_parquet(source: Source, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"{source.name}: not a readable Parquet file ({reason}); write it again")


def _parquet_text(value: object, key: str, where: str) -> str:
    try:
        return _checked(value.as_py(), key, where)  # type: ignore[attr-defined]
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {_INVALID.format(error.start)}") from error
