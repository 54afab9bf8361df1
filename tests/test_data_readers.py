"""Readers: every format, text kept byte for byte, pieces that change no token, bad input."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_cases import MOBY, RELAXED, VOCAB, text_of
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from looptx_core.data import tables
from looptx_core.data.corpus import PIECE, Corpus, boundary, cut_pieces, documents
from looptx_core.data.examples import read_examples
from looptx_core.data.records import media_named, read_records
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


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_what_has_no_end_is_refused(tmp_path: Path, name: str) -> None:
    """Also a file that became a device after it was found."""
    (tmp_path / name).write_text("")
    with Corpus([str(tmp_path / name)]) as corpus:
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(DataError, match="not a regular file"):
            list(corpus.records())


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
    monkeypatch.setattr(tables, "RECORD_LIMIT", 1 << 20)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * (1 << 20)}))
    with pytest.raises(DataError, match="line 1: longer than 1 MiB"):
        read(tmp_path / "a.jsonl")


def test_reading_imports_no_torch() -> None:
    code = (
        "import sys, looptx_core.data.resolve\n"
        "assert not {'torch', 'lightning', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Records of every form


def records(*inputs: Path) -> list[object]:
    with Corpus(list(inputs)) as corpus:
        return [record for _, record in corpus.records()]


def test_arrays_and_tables_are_records_and_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\ufeff [{"text": "x", "n": null}, {"text": "y"}]')
    (tmp_path / "lines.json").write_text('{"text": "x"}\n\n{"text": "y"}\n')
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfn,text\r\n1,"x, ""1""\r\n2"\r\n\r\n2,y\r\n')
    (tmp_path / "a.tsv").write_text("text\tn\nx\t1\n")
    assert read(tmp_path / "a.json") == read(tmp_path / "lines.json") == ["x", "y"]
    assert records(tmp_path / "a.json") == [{"text": "x"}, {"text": "y"}]
    assert read(tmp_path / "a.csv") == ['x, "1"\r\n2', "y"]
    assert read(tmp_path / "a.tsv") == ["x"]


BAD_TABLES = {
    "braces.json": (b'{"text": "x",\n "n": 1}', "line 1: not valid JSON"),
    "other.json": (b'[{"body": "x"}]', "item 1: no key 'text'"),
    "deep.json": (b"[" * 9999 + b"]" * 9999, "levels deep"),
    "number.json": (b"[5]", "item 1: no key 'text'"),
    "open.json": (b'[{"text": "x"}', "not valid JSON"),
    "quote.csv": (b'text\n"x', "not valid CSV"),
    "long.csv": (b"text,n\nx,1,2\n", "line 2: 3 values for 2 columns"),
    "short.csv": (b"text,n\nx\n", "line 2: 1 values for 2 columns"),
    "twice.csv": (b"text,text\nx,y\n", "name the columns, each once"),
    "semicolons.csv": (b"text;n\nx;1\n", "no key 'text'"),
    "nul.csv": (b"text\nx\0\n", "line 2: not valid CSV|NUL"),
    "a.txt": (b"\x1f\x8b\x08\0\xff\xff", "this is gzip; unpack it"),
    "a.jsonl": (b"\x28\xb5\x2f\xfd\0\xff", "this is zstd; unpack it"),
    "b.csv": (b"PK\x03\x04\xff\xfe", "this is zip; unpack it"),
    "twice.jsonl": (b'{"text": "x", "text": "y"}', "line 1: .*'text' stands twice"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(tmp_path: Path, name: str) -> None:
    content, message = BAD_TABLES[name]
    (tmp_path / name).write_bytes(content)
    if name == "nul.csv" and sys.version_info >= (3, 11):
        return  # Python's reader takes it since then
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)


def test_a_parquet_file_that_unfolds_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # A long value once in the file's dictionary, and then by number.
    words = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(1 << 20, np.int32)), pa.array(["x" * (1 << 20)])
    )
    pq.write_table(pa.table({"text": words}), tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 10_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Corpus([tmp_path / "bomb.parquet"]) as corpus:
        with pytest.raises(DataError, match="unfolds to over"):
            for document in corpus.documents():
                assert sum(map(len, document.pieces)) == 1 << 20
        with pytest.raises(DataError, match="unfolds to over"):
            for _, record in corpus.records():
                assert len(record["text"]) == 1 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "KiB"


def test_null_columns_are_absent(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"prompt": f"q{i} ", "response": f"a{i}", "messages": None, "text": None, "image": None}
        for i in range(4)
    ]
    rows += [{"text": f"t {i}", "prompt": None, "messages": None} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "a.parquet", "a.json"):
        assert len(read_examples([str(tmp_path / name)], tokenizer, seq_len=32).kept) == 8


def test_half_a_pair_is_named_or_skipped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "a.jsonl"
    good = [json.dumps({"prompt": f"q{i}", "response": "x"}) for i in range(2)]
    file.write_text("\n".join([*good, '{"prompt": "\\ud83d", "response": "x"}']))
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: holds half a surrogate pair"):
        read_examples([str(file)], tokenizer, seq_len=32)
    found = read_examples([str(file)], tokenizer, seq_len=32, skip_bad=True)
    assert (len(found.kept), found.skipped) == (2, 1)


def test_hidden_files_are_left_out_everywhere(tmp_path: Path, cat: Path) -> None:
    notes = tmp_path / "notes"
    (notes / ".app").mkdir(parents=True)
    (notes / "a.txt").write_text("x")
    (notes / ".app" / "icon.png").write_bytes(cat.read_bytes())
    assert not media_named([notes]) and read(notes) == ["x"]
    pairs = tmp_path / "pairs"
    (pairs / ".ipynb_checkpoints").mkdir(parents=True)
    for folder in (pairs, pairs / ".ipynb_checkpoints"):
        (folder / "1.png").write_bytes(cat.read_bytes())
    (pairs / "1.txt").write_text("a cat")
    assert media_named([pairs]) == {"image"} and len(read_records([pairs]).records) == 1


def test_links_out_of_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    (tmp_path / "texts" / "b.txt").symlink_to("a.txt")
    assert read(tmp_path / "texts") == ["x"]
    (tmp_path / "texts" / "c.txt").symlink_to("../secret.txt")
    with pytest.raises(DataError, match="leads out of"):
        read(tmp_path / "texts")
