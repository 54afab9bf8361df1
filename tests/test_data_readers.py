"""Readers: every format, text kept byte for byte, pieces that change no token, bad input."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_cases import MOBY, RELAXED, VOCAB, text_of
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from looptx_core.data import corpus as corpus_module
from looptx_core.data.corpus import PIECE, Corpus, boundary, cut_pieces, documents
from looptx_core.data.shard_writer import tokenize_corpus
from looptx_core.errors import DataError

pytestmark = pytest.mark.fast


def read(*inputs: str | Path, **options: str) -> list[str]:
    return ["".join(document.pieces) for document in documents(list(inputs), **options)]


def test_reads_files_folders_globs_and_every_format(texts: Path) -> None:
    everything = [text_of(i) for i in range(12)]
    assert read(texts) == everything
    assert read(f"{texts}/**/*.txt") == everything[:4]
    assert read(texts / "lines.jsonl", texts / "deep") == everything[4:8] + everything[:4]
    assert read(texts / "table.parquet") == everything[8:]
    # Named twice, read once.
    assert read(texts / "deep" / "0.txt", texts / "deep") == everything[:4]


def test_reads_another_text_key(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson").write_text('{"body": "x"}\n{"body": ""}\n{"body": "y"}')
    assert read(tmp_path / "a.ndjson", text_key="body") == ["x", "y"]


def test_standard_input_can_be_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("à la mer".encode())))
    with Corpus(["-"]) as corpus:
        for _ in range(2):
            assert ["".join(d.pieces) for d in corpus.documents()] == ["à la mer"]
        spooled = corpus.sources[0].path
    assert not spooled.exists()


def test_a_pipe_is_spooled(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"through a pipe")
    os.close(writer)
    assert read(f"/dev/fd/{reader}") == ["through a pipe"]
    os.close(reader)


def test_text_is_kept_byte_for_byte_except_for_a_bom(tmp_path: Path) -> None:
    text = "a\r\nb\x00\x1c\u2028c\t" + "é" * (PIECE - 7) + "🐋" * PIECE
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(tmp_path / "a.txt") == [text]


@RELAXED
@given(st.lists(st.text(max_size=30)), st.integers(1, 20), st.integers(1, 7))
def test_pieces_depend_on_the_text_alone(chunks: list[str], limit: int, size: int) -> None:
    text = "".join(chunks)
    whole = list(cut_pieces([text], limit))
    assert "".join(whole) == text
    assert all(0 < len(piece) <= limit for piece in whole)
    assert list(cut_pieces(chunks, limit)) == whole
    assert list(cut_pieces((text[i : i + size] for i in range(0, len(text), size)), limit)) == whole


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
SPACES = st.text(st.sampled_from(" \n\t\r\x1c\x85\xa0\u3000"), max_size=3)


@RELAXED
@given(st.lists(st.tuples(WORDS, SPACES, st.sampled_from(" \n\t\r"))))
def test_cutting_does_not_change_the_tokens(
    tokenizer: Tokenizer, parts: list[tuple[str, str, str]]
) -> None:
    text = "".join("x" + word + "x" + ascii_space + spaces for word, spaces, ascii_space in parts)
    pieces = list(cut_pieces([text], 24))
    joined = [id_ for piece in pieces for id_ in tokenizer.encode(piece).ids]
    assert joined == tokenizer.encode(text).ids


def test_cutting_real_text_does_not_change_the_tokens(tokenizer: Tokenizer) -> None:
    text = MOBY[:100_000]
    joined = [i for piece in cut_pieces([text], 100) for i in tokenizer.encode(piece).ids]
    assert joined == tokenizer.encode(text).ids


def test_a_boundary_lies_before_whitespace_or_where_it_must() -> None:
    assert boundary("one two  three", 0, 10) == 7
    assert boundary("one two", 0, 3) == 3
    assert boundary("onetwo", 0, 4) == 4
    assert boundary("a    b", 0, 4) == 1


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"ok " * 30_000 + b"\xff", "invalid UTF-8 at byte 90000"),
        ("a.txt", b"x" * (PIECE - 1) + "é".encode()[:1], f"invalid UTF-8 at byte {PIECE - 1}"),
        ("a.txt", b"x" * (PIECE - 1) + b"\xc3\xc3", f"invalid UTF-8 at byte {PIECE - 1}"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2: invalid UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "line 3: not valid JSON"),
        ("a.jsonl", b"[" * 200_000, "line 1: not valid JSON"),
        ("a.jsonl", b'{"txt": "a"}', "line 1: no key 'text'"),
        ("a.jsonl", b'["text"]', "line 1: no key 'text'"),
        ("a.jsonl", b'{"text": null}', "'text' is NoneType"),
        ("a.jsonl", b'{"text": "\\ud800"}', "surrogate"),
        ("a.parquet", b"PAR1 but not really", "not a readable Parquet file"),
        ("a.txt", b"", "empty"),
        ("a.jsonl", b'{"text": ""}\n', "empty"),
        ("a.txt", b"x", "empty"),
    ],
)
def test_bad_content_is_a_data_error(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        tokenize_corpus([tmp_path / name], tmp_path / "out", VOCAB)
    message = str(caught.value)
    assert told in message
    assert str(tmp_path / name) in message
    assert "\n" not in message
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_bad_parquet_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text'.*body"):
        read(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="row 2: 'text' is NoneType"):
        read(tmp_path / "b.parquet")
    foreign = pa.array([b"a", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": foreign}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="row 2: invalid UTF-8 at byte 0"):
        read(tmp_path / "c.parquet")


@pytest.mark.parametrize("missing", ["nowhere.txt", "*.nothing", "."])
def test_inputs_that_are_not_there(tmp_path: Path, missing: str) -> None:
    with pytest.raises(DataError, match=r"no such file|matches no files|holds no files"):
        read(tmp_path / missing)


def test_no_inputs() -> None:
    with pytest.raises(DataError, match="no input"):
        read()


def test_too_long_a_json_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "RECORD_LIMIT", 1 << 20)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * (1 << 20)}))
    with pytest.raises(DataError, match="line 1: longer than 1 MiB"):
        read(tmp_path / "a.jsonl")


def test_reading_imports_no_torch() -> None:
    code = (
        "import sys, looptx_core.data.resolve\n"
        "assert not {'torch', 'lightning', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
