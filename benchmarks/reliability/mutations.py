"""What is done to a sound file to make it a bad one. Every choice is a `random.Random`'s."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

LONG = 2 << 20
_PIECES = (
    b"\0", b"\xff", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc3", b"\r",
    b"\x1b[31m", b"\xe2\x80\xa8", b"{", b"[", b"]", b"}", b":", b",", b"\n", b"-", b"1e999", b"NaN",
    b"[" * 5000, b'{"a":' * 5000, b"\x1f\x8b\x08\0", b"PK\x03\x04", b"PAR1", b"&a [*a]", b"null",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**400,
    -(2**63), 0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf"), -float("inf"), "", " ", "a",
    "1", "-1", "none", "nan", "é\u2028", "\ud800", "\x1b[31mred", "\0", "../x", "/etc/passwd",
    "/dev/zero", ".", "(", "x" * 100_000, [], {}, [[]], [None], [1, 2], {"a": 1}, {"": None},
    ["a"] * 1000,
)  # fmt: skip


def file(rng: random.Random, path: Path) -> str:
    """Spoil one file, by its kind or whatever kind it is; a few words of what was done."""
    ways: list[Callable[[random.Random, Path], str]] = [_bytes] * 3 + [_place]
    if path.suffix in (".json", ".jsonl", ".yaml") and path.stat().st_size < LONG:
        ways += [_json] * 6
    if path.suffix == ".safetensors":
        ways += [_header] * 3 + [_tensors] * 2
    if path.suffix in (".csv", ".txt", ".jinja"):
        ways += [_text] * 2
    return rng.choice(ways)(rng, path)


def _bytes(rng: random.Random, path: Path) -> str:
    raw = bytearray(path.read_bytes())
    at, end = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    end = min(end, at + rng.choice((1, 4, 16, 300, 10**9)))
    match rng.randrange(8):
        case 0:
            for _ in range(rng.choice((1, 1, 3, 30))):
                if raw:
                    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            done = "bits flipped"
        case 1:
            del raw[at:]
            done = "cut short"
        case 2:
            raw[at:at] = raw[at:end] * rng.choice((1, 1, 50))
            done = "a part repeated"
        case 3:
            del raw[at:end]
            done = "a part removed"
        case 4:
            raw.clear()
            done = "emptied"
        case 5:
            raw[at:at] = rng.choice(_PIECES)
            done = "something put in"
        case 6:
            size = rng.choice((1, 2, 4, 8))
            raw[at : at + size] = rng.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * size
            done = "a number overwritten"
        case _:
            done = "made long"
            part = bytes(raw[at:end]) or b"a"
            # One long line rather than a million prompts, which would be work by right.
            raw[at:at] = part * (30 if b"\n" in part else LONG // len(part))
    path.write_bytes(raw)
    return done


def _text(rng: random.Random, path: Path) -> str:
    text = path.read_text("utf-8", "replace")
    code = rng.choice(("utf-16", "utf-8-sig", "latin-1", "utf-32", "cp037"))
    if rng.random() < 0.5:
        path.write_bytes(text.encode(code, "replace"))
        return f"in {code}"
    lines = text.splitlines(keepends=True)
    rng.shuffle(lines)
    if lines:
        lines[rng.randrange(len(lines))] = rng.choice(('"', "\0\n", ",,,,,,\n", "x" * LONG, "\r"))
    path.write_text("".join(lines), "utf-8")
    return "lines shuffled"


def _place(rng: random.Random, path: Path) -> str:
    """Something else in a file's place."""
    path.unlink()
    match rng.randrange(8):
        case 0:
            return "removed"
        case 1:
            path.mkdir()
            return "a folder in its place"
        case 2:
            path.symlink_to(path.name)
            return "a link to itself"
        case 3:
            path.symlink_to("/dev/zero")
            return "a link to /dev/zero"
        case 4:
            path.symlink_to("/etc/passwd")
            return "a link that leads out"
        case 5:
            os.mkfifo(path)
            return "a pipe in its place"
        case 6:
            path.symlink_to(path.parent.absolute(), target_is_directory=True)
            return "a link to its folder"
        case _:
            path.symlink_to("gone")
            return "a link to nothing"


def places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of each value below a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [node]
    while waiting:
        here = waiting.pop()
        keys = here if isinstance(here, dict) else range(len(here))
        for key in keys:
            found.append((here, key))
            if isinstance(here[key], dict | list):
                waiting.append(here[key])
    return found


def _value(rng: random.Random) -> Any:
    """A copy, since the next change may be inside of it."""
    return deepcopy(rng.choice(_VALUES))


def spoil(rng: random.Random, tree: Any) -> Any:
    """A JSON value with one to three of its parts changed, removed, added or exchanged."""
    if rng.random() < 0.04:
        return _value(rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = places(tree) if isinstance(tree, dict | list) else []
        if not found:
            return _value(rng)
        # Of the few outer places as often as of the many inner ones.
        outer = [pair for pair in found if pair[0] is tree]
        holder, key = rng.choice(outer if rng.random() < 0.5 else found)
        match rng.randrange(8):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("x", "", "\x1b[31m", "type", "\ud800"))] = _value(rng)
            case 2:
                other, theirs = rng.choice(places(tree))
                with contextlib.suppress(RecursionError):  # deep from the change before
                    holder[key] = json.loads(json.dumps(other[theirs]))
            case 3:
                nested: Any = holder[key]
                for _ in range(rng.choice((1, 70, 3000))):
                    nested = [nested] if rng.random() < 0.5 else {"a": nested}
                holder[key] = nested
            case 4 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                change = rng.choice((-1, 1, 0.5, 1000, -1000, 1 << 20))
                with contextlib.suppress(OverflowError):
                    holder[key] += change
            case _:
                holder[key] = _value(rng)
    return tree


def written(tree: Any) -> bytes:
    """JSON without any rule, so that NaN, half surrogates and depths can be written."""
    with contextlib.suppress(RecursionError):
        return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return b'{"a":' * 3000 + b"1" + b"}" * 3000


def _json(rng: random.Random, path: Path) -> str:
    """Also of YAML, whose sound files are written as JSON, and of JSON lines."""
    text = path.read_text("utf-8", "replace")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    at = rng.randrange(len(lines)) if lines else 0
    try:
        tree = json.loads(lines[at])
    except (ValueError, IndexError):
        return _bytes(rng, path)
    if isinstance(tree, dict) and tree and rng.random() < 0.08:
        key = rng.choice(list(tree))
        twin = b"{" + written(key) + b":" + written(_value(rng)) + b", "
        made, done = twin + written(tree)[1:], "a key twice"
    else:
        made, done = written(spoil(rng, tree)), "a value changed"
    parts = [line.encode("utf-8", "replace") for line in lines]
    parts[at] = made
    path.write_bytes(b"\n".join(parts))
    return done


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _join(path: Path, header: Any, data: bytes) -> None:
    text = written(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _header(rng: random.Random, path: Path) -> str:
    try:
        header, data = _split(path)
    except ValueError:
        return _bytes(rng, path)
    names = [name for name in header if name != "__metadata__"]
    match rng.randrange(3):
        case 0 if names:  # another type or shape of the same size
            entry = header[rng.choice(names)]
            kinds = {4: ("F32", "I32", "U32"), 2: ("F16", "BF16", "I16"), 1: ("U8", "I8", "BOOL")}
            same = next((k for k in kinds.values() if entry["dtype"] in k), ("F32",))
            entry["dtype"] = rng.choice(same)
            rng.shuffle(entry["shape"])
        case 1 if names:
            header[rng.choice(("x", "\x1b[31m", "y" * 5000))] = header.pop(rng.choice(names))
        case _:
            header = spoil(rng, header)
    _join(path, header, data)
    return "the header changed"


def _tensors(rng: random.Random, path: Path) -> str:
    """Numbers of a tensor become NaN, infinite, huge or nothing."""
    try:
        header, data = _split(path)
    except ValueError:
        return _bytes(rng, path)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    start, stop = entry["data_offsets"]
    made = bytearray(data)
    word = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\0\0\0\0"))
    if rng.random() < 0.5:
        at = start + 4 * rng.randrange(max(1, (stop - start) // 4))
        made[at : at + 4] = word
    else:
        made[start:stop] = word * ((stop - start) // 4) + b"\0" * ((stop - start) % 4)
    _join(path, header, bytes(made)[: len(data)])
    return "numbers of a tensor changed"


def copy(source: Path, target: Path) -> None:
    """A file or a folder, with links as links."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)
