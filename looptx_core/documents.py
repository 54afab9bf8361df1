"""Small files that somebody else may have written: JSON, JSON lines, YAML and plain text.

Every reader here has the same limits: a size, a depth, UTF-8 (a byte order mark is accepted),
no key twice, no NaN or infinity, no half of a surrogate pair. What breaks one is reported in one
line that names the file, the place and the remedy. `schema.py` checks what was read.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import select
import stat
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from looptx_core.errors import DataError, LooptxError

MOST_BYTES = 64 << 20
"""Of a small file. The largest honest ones are indexes of weights and lists of metrics."""
PIPE_SECONDS = 5.0
"""How long a writer of a pipe is waited for."""
_SIGNAL_MILLISECONDS = 500
_PIECE = 1 << 16
MOST_DEPTH = 64
"""Levels of lists and mappings within each other."""
COPY_AGAIN = "copy the model again"
_NESTED = f"nested more than {MOST_DEPTH} levels deep"
_KINDS = {
    b"\x1f\x8b": "gzip; unpack it by gunzip",
    b"\x28\xb5\x2f\xfd": "zstd; unpack it by unzstd",
    b"\xfd7zXZ\0": "xz; unpack it by unxz",
    b"BZh": "bzip2; unpack it by bunzip2",
    b"\x04\x22\x4d\x18": "lz4; unpack it by unlz4",
    b"PK\x03\x04": "zip; unpack it by unzip",
    b"PAR1": "Parquet; give it the ending .parquet",
    b"%PDF": "PDF; extract its text",
    b"\x89PNG": "PNG, not text",
    b"\xff\xd8\xff": "JPEG, not text",
    b"\xff\xfe": "UTF-16; convert it to UTF-8",
    b"\xfe\xff": "UTF-16; convert it to UTF-8",
}


def check_links(folder: Path, error: type[LooptxError] = DataError) -> None:
    """Raise for a link in a folder that leads out of it, or in a circle; see `check_inside`."""
    for file in folder.iterdir():
        if file.is_symlink():
            check_inside(file, folder, error)


def check_regular(folder: Path) -> None:
    """Raise `DataError` for what is neither a file nor a folder: opening a pipe never ends."""
    for file in folder.rglob("*"):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise DataError(f"{file}: not a regular file; remove it")


def check_inside(file: Path, folder: Path, error: type[LooptxError] = DataError) -> None:
    """Raise for a file that, its links followed, lies outside of a folder.

    A snapshot in a cache of the Hugging Face hub may link to the blobs of its repository.
    """
    try:
        root, end = folder.resolve(), file.resolve()
        end.stat()
    except (OSError, RuntimeError) as cause:
        raise error(f"{file}: a link that leads nowhere or in a circle; remove it") from cause
    roots = [root]
    roots += [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if not any(end.is_relative_to(allowed) for allowed in roots):
        raise error(f"{file}: a link that leads out of {folder}; put the file itself there")


def known_kind(first: bytes) -> str | None:
    """What a file is by its first bytes, with the remedy; None for what is none of these."""
    return next((kind for magic, kind in _KINDS.items() if first.startswith(magic)), None)


def open_input(file: str | os.PathLike[str], *, pipes: bool = True) -> io.BufferedReader:
    """Open what a user named, so that reading it comes to an end.

    pipes: accept a pipe too, as a shell's `<(...)` is one, that somebody writes to.

    Raises `OSError` for any other file that is not a regular one: a device may have no end, and a
    pipe without a writer would be waited for.
    """
    # Without O_NONBLOCK a pipe that nobody writes to would wait for ever.
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISREG(mode):
            return os.fdopen(handle, "rb")
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        if not (pipes and (stat.S_ISFIFO(mode) or os.isatty(handle))):
            raise OSError(errno.EINVAL, "not a regular file", str(file))
        if stat.S_ISFIFO(mode):
            waiting = select.poll()
            waiting.register(handle, select.POLLIN)
            if not waiting.poll(PIPE_SECONDS * 1000) and not _has_writer(handle):
                raise OSError(errno.EPIPE, "a pipe that nobody writes to", str(file))
        os.set_blocking(handle, True)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def arriving(stream: BinaryIO) -> Iterator[bytes]:
    """The bytes of a buffered stream as they come, to its end, 64 KiB or less at a time.

    A signal whose handler stops the program is noticed within half a second, also one that comes
    just before a read begins to wait; such a read would wait for the next byte.
    """
    waiting, known = select.poll(), False
    with contextlib.suppress(OSError):  # a stream in memory, which is not waited for
        waiting.register(stream.fileno(), select.POLLIN)
        known = True
    while True:
        while known and not waiting.poll(_SIGNAL_MILLISECONDS):
            pass
        part = stream.read1(_PIECE)  # type: ignore[attr-defined]
        if not part:
            return
        yield part


def _has_writer(pipe: int) -> bool:
    """Whether a pipe that holds nothing, opened without blocking, has a writer."""
    try:
        os.read(pipe, 1)  # a byte that came this very moment is lost, so that writer is refused
    except BlockingIOError:
        return True
    return False


def read_text(
    file: Path,
    *,
    most: int = MOST_BYTES,
    mend: str = COPY_AGAIN,
    error: type[LooptxError] = DataError,
    pipes: bool = False,
) -> str:
    """A file's text, without a byte order mark.

    Args:
        most: bytes that are accepted.
        mend: the remedy, the end of an error's line.
        error: the class of error to raise.
        pipes: accept a pipe too; see `open_input`.
    """
    try:
        with open_input(file, pipes=pipes) as data:
            raw = data.read(most + 1)
    except FileNotFoundError as cause:
        if error is DataError:  # a file that its folder should have
            place = f"{file.parent}: " if file.parent != Path() else ""
            raise error(f"{place}{file.name} is missing; {mend}") from cause
        raise error(f"{file}: cannot be read ({cause.strerror}); {mend}") from cause
    except (OSError, ValueError) as cause:
        reason = getattr(cause, "strerror", None) or str(cause)
        raise error(f"{file}: cannot be read ({reason}); {mend}") from cause
    if len(raw) > most:
        raise error(f"{file}: over {most:,} bytes, too large for such a file; {mend}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        kind = known_kind(raw)
        what = f"this is {kind}" if kind else f"byte {cause.start} is not UTF-8; {mend}"
        raise error(f"{file}: {what}") from cause


def read_json(
    file: Path,
    *,
    most: int = MOST_BYTES,
    mend: str = COPY_AGAIN,
    error: type[LooptxError] = DataError,
) -> dict[str, Any]:
    """The object that a JSON file holds. Arguments: those of `read_text`."""
    text = read_text(file, most=most, mend=mend, error=error)
    content = parse_json(text, str(file), mend=mend, error=error)
    check_characters(content, str(file), mend=mend, error=error)
    if not isinstance(content, dict):
        raise error(f"{file}: expected a JSON object; {mend}")
    return content


def read_json_lines(
    file: Path, *, mend: str = COPY_AGAIN, error: type[LooptxError] = DataError
) -> Iterator[tuple[str, Any]]:
    """(where it stands, the value) of each line that is not blank; see `lines_of`."""
    for number, line in enumerate(lines_of(read_text(file, mend=mend, error=error)), 1):
        if line.strip():
            where = f"{file}, line {number}"
            value = parse_json(line, where, mend=mend, error=error)
            check_characters(value, where, mend=mend, error=error)
            yield where, value


def lines_of(text: str) -> list[str]:
    """Lines as JSON lines and shells have them: U+2028, U+0085 and the like end none."""
    return text.replace("\r\n", "\n").split("\n")


def parse_json(
    text: str,
    where: str,
    *,
    mend: str = COPY_AGAIN,
    error: type[LooptxError] = DataError,
    any_number: bool = False,
) -> Any:
    """A JSON value. any_number: accept NaN and infinity, in values that nobody looks at."""
    strict: dict[str, Any] = {} if any_number else {"parse_constant": _no, "parse_float": _finite}
    try:
        value = json.loads(text, object_pairs_hook=_without_twins, **strict)
        if text.count("[") + text.count("{") > MOST_DEPTH and _too_deep(value):
            raise RecursionError
        return value
    except RecursionError as cause:
        raise error(f"{where}: not valid JSON ({_NESTED}); {mend}") from cause
    except ValueError as cause:
        reason = getattr(cause, "msg", None) or str(cause).splitlines()[0]
        if (line := getattr(cause, "lineno", 1)) > 1:
            reason += f" at line {line}"
        raise error(f"{where}: not valid JSON ({reason}); {mend}") from cause


def check_characters(
    value: Any, where: str, *, mend: str = COPY_AGAIN, error: type[LooptxError] = DataError
) -> None:
    """Raise for half of a surrogate pair in any string, which no UTF-8 file can hold."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str(text):
                if not text.isascii() and _HALF.search(text):
                    raise error(f"{where}: holds half a surrogate pair; {mend}")
            case dict(mapping):
                waiting += mapping
                waiting += mapping.values()
            case list(items):
                waiting += items


_HALF = re.compile("[\ud800-\udfff]")


def has_half(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, and so is no Unicode text."""
    return not text.isascii() and _HALF.search(text) is not None


def is_one_of(value: Any, names: Container[str]) -> bool:
    """Whether a value that a file holds, of whatever type, is one of these names."""
    return isinstance(value, str) and value in names


def printable(text: str, keep: str = "") -> str:
    """A text of unknown origin with what would steer a terminal written out, as `\\x1b`.

    Escaped are control characters other than those in `keep`, marks that turn the direction of
    writing, separators of lines, and halves of surrogate pairs.
    """

    def escape(match: re.Match[str]) -> str:
        char = match[0]
        return char if char in keep else char.encode("unicode_escape", "surrogatepass").decode()

    return _STEERS.sub(escape, text)


_STEERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def to_json(content: Mapping[str, Any]) -> str:
    """A JSON file's text. Raises `ValueError` for NaN or infinity, which are not JSON."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def some(names: list[str]) -> str:
    """'a, b, c and 4 more'."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(short(name, 100) for name in names[:3]) + more


def short(value: object, most: int = 60) -> str:
    """A value for a message, cut where it is long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def _no(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{short(text, 20)} is too large a number")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{short(twin)}' stands twice")
    return made


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
