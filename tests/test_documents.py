"""The readers of small files: limits, one kind of error, and a schema."""

from __future__ import annotations

import io
import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from looptx_core.config.resolve import resolve
from looptx_core.config.run import TrainConfig
from looptx_core.config.yaml_file import read_yaml
from looptx_core.documents import (
    MOST_DEPTH,
    arriving,
    check_links,
    parse_json,
    read_json,
    read_json_lines,
    read_text,
    to_json,
)
from looptx_core.errors import DataError, UsageError
from looptx_core.schema import typed

BAD_JSON = {
    "deep lists": ("[" * 100_000 + "]" * 100_000, "levels deep"),
    "deep objects": ('{"a":' * 2_000 + "1" + "}" * 2_000, "levels deep"),
    "a little too deep": ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "levels deep"),
    "NaN": ('{"a": NaN}', "NaN is no number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is no number"),
    "too large": ('{"a": 1e999}', "too large a number"),
    "digits": ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
    "a key twice": ('{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' stands twice"),
    "half a pair": ('{"a": ["\\ud83d"]}', "half a surrogate pair"),
    "half a pair in a key": ('{"\\ude00": 1}', "half a surrogate pair"),
    "cut": ('{"a": ', "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "a list": ("[1]", "expected a JSON object"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_one_line(case: str, tmp_path: Path) -> None:
    text, message = BAD_JSON[case]
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_json(file)
    line = str(caught.value)
    assert str(file) in line and "copy the model again" in line and "\n" not in line
    assert len(line) < 300 + len(str(file))


def test_good_json(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00", "b": [1e3, null, true]}')
    assert read_json(file) == {"a": "\U0001f600", "b": [1000.0, None, True]}
    deep = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert parse_json(deep, "here") != []
    with pytest.raises(ValueError):
        to_json({"a": float("nan")})


BAD_BYTES = {
    "gzip": (b"\x1f\x8b\x08\0\xff", "this is gzip; unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd\xff", "this is zstd; unpack it"),
    "utf-16": ("{}".encode("utf-16"), "this is UTF-16"),
    "latin-1": ("{'a': 'é'}".encode("latin-1"), "byte 7 is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_other_bytes_are_named(case: str, tmp_path: Path) -> None:
    raw, message = BAD_BYTES[case]
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read_json(tmp_path / "x.json")


def test_large_files_and_no_files(tmp_path: Path) -> None:
    (tmp_path / "large").write_text("x" * 11)
    assert read_text(tmp_path / "large", most=11) == "x" * 11
    with pytest.raises(DataError, match="over 10 bytes"):
        read_text(tmp_path / "large", most=10)
    os.mkfifo(tmp_path / "pipe")
    for name, message in [
        ("none", "none is missing"), (".", "not a regular file|directory"),
        ("pipe", "not a regular file"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            read_text(tmp_path / name)
    with pytest.raises(DataError, match="cannot be read"):
        read_text(Path("a\0b"))


def test_a_signal_is_noticed_while_a_stream_is_waited_for() -> None:
    """One that another thread takes does not interrupt the read, as one just before it does not."""
    reader, writer = os.pipe()
    os.write(writer, b"some")
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)

    def send() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    later = [threading.Timer(0.1, send), threading.Timer(5, os.close, [writer])]
    try:
        with os.fdopen(reader, "rb") as stream, pytest.raises(KeyboardInterrupt):
            for part in arriving(stream):
                assert part == b"some"
                for timer in later:
                    timer.start()
    finally:
        signal.signal(signal.SIGUSR1, before)
        later[1].cancel()
    os.close(writer)
    assert list(arriving(io.BytesIO(b"in memory"))) == [b"in memory"]


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes('\ufeff"a\u2028b"\r\n\n  \n"c\x85d"\n5'.encode())
    assert [value for _, value in read_json_lines(file)] == ["a\u2028b", "c\x85d", 5]
    file.write_text('{}\n\n{"a": 1, "a": 2}\n')
    with pytest.raises(DataError, match=r"x\.jsonl, line 3: .*stands twice"):
        list(read_json_lines(file))


BAD_YAML = {
    "a key twice": ("lr: 0.1\nlr: 0.2\n", "line 2: .*the key 'lr' stands twice"),
    "a section twice": ("model: {d_model: 64}\nmodel: {d_ff: 64}\n", "line 2: .*'model' stands"),
    "a key of a section twice": ("model:\n  d_ff: 1\n  d_ff: 2\n", "line 3: .*'d_ff' stands twice"),
    "deep": ("lr: " + "[" * 5_000 + "]" * 5_000, "levels deep"),
    "aliases": (
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", r"line 2: .*\*a repeats a list",
    ),
    "itself": ("a: &a\n  b: *a\n", "repeats a list or a mapping|not valid YAML"),
    "a wrong type": ("steps: 5\nlr: fast\n", "line 2: lr: expected a number, not 'fast'"),
    "a section's wrong type": ("model:\n  d_ff: x\n", "line 2: model.d_ff: expected a whole"),
    "an unknown key": ("steps: 5\n\nstep: 5\n", "line 3: unknown key 'step'"),
    "digits": ("steps: " + "1" * 5000, "not valid YAML"),
    "infinity": ("lr: .inf", "expected a number"),
    "2^64": ("steps: 18446744073709551616", "expected a whole number"),
    "an object": ("lr: !!python/object:os.system {}", "not valid YAML"),
    "no keys": ("- 1", "expected keys and values"),
    "control characters": ("a: \x01", "not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_YAML)
def test_bad_yaml_names_key_and_line(case: str, tmp_path: Path) -> None:
    text, message = BAD_YAML[case]
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        resolve(TrainConfig, {"model": _Model}, config=file, env={})
    assert str(file) in str(caught.value) and len(str(caught.value)) < 300 + len(str(file))


@dataclass(frozen=True)
class _Model:
    d_model: int = 1
    d_ff: int = 1


def test_plain_words_are_what_they_look_like(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "a: 2:1\nb: 017\nc: 2024-01-02\nd: 1_000\ne: 0x10\nf: 1e-3\ng: yes\nh: &x .5\ni: *x\nj: -3"
    )
    tree, lines = read_yaml(file)
    assert tree == {
        "a": "2:1", "b": "017", "c": "2024-01-02", "d": 1000, "e": 16, "f": 1e-3, "g": True,
        "h": 0.5, "i": 0.5, "j": -3,
    }  # fmt: skip
    assert lines["c",] == 3
    file.write_text("\ufeffmix: 2:1")
    assert resolve(TrainConfig, config=file, env={}).values["mix"] == "2:1"


def test_home_in_a_file_and_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "c.yaml"
    file.write_text("out: ~/runs/x\n")
    found = resolve(TrainConfig, flags={"data": ["~/a.txt", "b~"]}, config=file, env={})
    assert found.values["out"] == "/home/me/runs/x"
    assert found.values["data"] == ("/home/me/a.txt", "b~")


@dataclass(frozen=True)
class _Inner:
    size: int


@dataclass(frozen=True)
class _Outer:
    name: str
    parts: dict[str, _Inner] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    share: float = 0.5
    more: dict[str, Any] = field(default_factory=dict)


BAD_VALUES: dict[str, tuple[Any, str]] = {
    "no mapping": ([1], "expected keys and values"),
    "missing": ({}, "name is missing"),
    "unknown": ({"name": "a", "nam": 1}, "unknown nam"),
    "text for a list": ({"name": "a", "sizes": "12"}, "sizes: expected a list"),
    "a number for keys": ({"name": "a", "parts": 5}, "parts: expected keys and values"),
    "an inner type": ({"name": "a", "parts": {"b": {"size": "x"}}}, "parts, b.*size: expected"),
    "an inner key": ({"name": "a", "parts": {"b": {}}}, "parts, b.*size is missing"),
    "an item": ({"name": "a", "sizes": [1, None]}, "sizes, item 2: expected a whole number"),
    "a list for text": ({"name": ["a"]}, "name: expected text"),
    "huge": ({"name": "a", "share": "9" * 400}, "share: expected a number"),
    "long": ({"name": {"x": "y" * 10_000}}, "name: expected text"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_schema_names_the_place(case: str) -> None:
    values, message = BAD_VALUES[case]
    with pytest.raises(DataError, match=message) as caught:
        typed(_Outer, values, "x.json")
    assert str(caught.value).startswith("x.json: ") and len(str(caught.value)) < 250


def test_a_schema_makes_the_whole() -> None:
    made = typed(
        _Outer, {"name": "a", "parts": {"b": {"size": 3}}, "sizes": [1.0, 2], "new": 1}, "x.json",
        ignore_unknown=True,
    )  # fmt: skip
    assert made == _Outer("a", {"b": _Inner(3)}, [1, 2])


def test_links_stay_inside(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.json").write_text("{}")
    (folder / "b.json").symlink_to("a.json")
    check_links(folder)
    (tmp_path / "secret").write_text("x")
    for target in ("../secret", "c.json", "nothing"):
        (folder / "c.json").symlink_to(target)
        with pytest.raises(DataError, match="a link that leads"):
            check_links(folder)
        (folder / "c.json").unlink()


def test_a_snapshot_of_the_hub_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot.parents[1] / "blobs" / "77").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/77")
    check_links(snapshot)


def test_what_has_no_end_or_no_writer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device, and a pipe that nobody writes to, wherever a file may be named; a pipe is read."""
    from looptx_core import documents
    from looptx_core.checkpoint.weights import refuse_pickle
    from looptx_core.data.corpus import Corpus
    from looptx_core.media.image.read import opened

    monkeypatch.setattr(documents, "PIPE_SECONDS", 0.1)
    os.mkfifo(tmp_path / "x.png")
    for place, message in (
        (tmp_path / "x.png", "a pipe that nobody writes to"),
        (Path("/dev/zero"), "not a regular file"),
    ):
        with pytest.raises(DataError, match=message):
            Corpus([place])
        with pytest.raises(DataError, match=message), opened(place, None):
            pass
        with pytest.raises(DataError, match="not a regular file"):
            refuse_pickle(place)
    reader, writer = os.pipe()
    os.write(writer, b"through a pipe")
    with documents.open_input(f"/dev/fd/{reader}") as stream:
        os.close(writer)
        assert stream.read() == b"through a pipe"
    os.close(reader)
