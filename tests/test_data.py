"""Readers, tokenizer and shards, against explicit references and with bad input."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from looptx_core.data import corpus as corpus_module
from looptx_core.data.bundled import bundled_shards
from looptx_core.data.corpus import PIECE, Corpus, boundary, bundled_text, cut_pieces, documents
from looptx_core.data.datamodule import TokenData
from looptx_core.data.hops import MAX_HOPS, hop_lines, hop_probes
from looptx_core.data.resolve import cached_shards, resolve_data
from looptx_core.data.shard_writer import tokenize_corpus
from looptx_core.data.shards import Manifest, open_shards
from looptx_core.data.tokenizer import (
    END,
    MIN_VOCAB,
    SPECIAL_TOKENS,
    StreamDecoder,
    end_id,
    fingerprint,
    load_tokenizer,
    spread_sample,
    train_tokenizer,
)
from looptx_core.errors import DataError, LooptxError, UsageError

VOCAB = 400
MOBY = bundled_text().read_text("utf-8")
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
RELAXED = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([MOBY[:200_000]], VOCAB)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve short documents in files of three kinds."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path / "corpus"
    (root / "deep").mkdir(parents=True)
    for i in range(4):
        (root / "deep" / f"{i}.txt").write_text(text_of(i), "utf-8")
    lines = [json.dumps({"text": text_of(i), "n": i}) for i in range(4, 8)]
    (root / "lines.jsonl").write_text("\n".join(lines) + "\n\n", "utf-8")
    pq.write_table(
        pa.table({"n": [1] * 4, "text": [text_of(i) for i in range(8, 12)]}),
        root / "table.parquet",
        row_group_size=3,
    )
    (root / ".hidden").write_bytes(b"\xff")
    return root


def text_of(i: int) -> str:
    return f"document {i} début 🐋 " + MOBY[i * 3000 : i * 3000 + 2500]


def read(*inputs: str | Path, **options: str) -> list[str]:
    return ["".join(document.pieces) for document in documents(list(inputs), **options)]


def contents(root: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in root.iterdir()}


# Readers


def test_reads_files_folders_globs_and_every_format(folder: Path) -> None:
    everything = [text_of(i) for i in range(12)]
    assert read(folder) == everything
    assert read(f"{folder}/**/*.txt") == everything[:4]
    assert read(folder / "lines.jsonl", folder / "deep") == everything[4:8] + everything[:4]
    assert read(folder / "table.parquet") == everything[8:]
    # Named twice, read once.
    assert read(folder / "deep" / "0.txt", folder / "deep") == everything[:4]


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


# Tokenizer


@RELAXED
@given(ANY_TEXT)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_have_fixed_ids_and_never_come_from_text(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(name) for name in SPECIAL_TOKENS] == list(range(16))
    assert end_id(tokenizer) == 0
    again = load_tokenizer_of(tokenizer)
    for one in (tokenizer, again):
        ids = one.encode("a<|end|>b<|image|>").ids
        assert min(ids) >= len(SPECIAL_TOKENS)
        assert one.decode(ids) == "a<|end|>b<|image|>"


def load_tokenizer_of(tokenizer: Tokenizer) -> Tokenizer:
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "tokenizer.json").write_text(tokenizer.to_str())
        return load_tokenizer(root)


def test_each_digit_is_a_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a 1851").tokens == ["a", "Ġ", "1", "8", "5", "1"]


def test_vocabulary_bounds() -> None:
    assert train_tokenizer(["some text"], MIN_VOCAB).get_vocab_size() == MIN_VOCAB
    with pytest.raises(UsageError, match=f"at least {MIN_VOCAB}"):
        train_tokenizer(["some text"], MIN_VOCAB - 1)
    with pytest.raises(DataError, match="at most") as caught:
        train_tokenizer([MOBY[:5000]], 4096)
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert train_tokenizer([MOBY[:5000]], largest).get_vocab_size() == largest


def test_training_is_deterministic_and_fingerprinted(tokenizer: Tokenizer) -> None:
    again = train_tokenizer([MOBY[:200_000]], VOCAB)
    assert again.to_str() == tokenizer.to_str()
    assert fingerprint(load_tokenizer_of(again)) == fingerprint(tokenizer)
    again.enable_truncation(8)
    assert fingerprint(again) == fingerprint(tokenizer)
    assert fingerprint(train_tokenizer([MOBY[:200_000]], VOCAB + 1)) != fingerprint(tokenizer)


def test_the_sample_is_bounded_and_spread() -> None:
    pieces = [f"piece {i} " + "x" * 90 for i in range(1000)]
    sample = spread_sample(pieces, max_bytes=10_000)
    assert 5_000 < sum(map(len, sample)) <= 10_000
    assert sample == pieces[:: 1000 // len(sample) + 1]
    unique = spread_sample([f"{i:08d}" for i in range(10_000)], max_unique=8_000)
    assert 500 <= len(unique) <= 1_000
    assert int(unique[-1]) > 9_900
    assert len(spread_sample(["same words"] * 1000, max_unique=100)) == 1000


def test_very_long_words_train_fast() -> None:
    rng = np.random.default_rng(0)
    word = "".join(map(chr, rng.integers(97, 123, 1_000_000)))
    assert train_tokenizer(cut_pieces([word]), 512).get_vocab_size() == 512


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"model": 1}')
    (tmp_path / "b.json").write_bytes(b"\x80\x04")
    for name in ("a.json", "b.json", "none.json", "."):
        with pytest.raises(DataError, match=r"tokenizer\.json") as caught:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="ends a document"):
        end_id(Tokenizer(models.BPE()))


# Stream decoding


def stream(tokenizer: Tokenizer, ids: Sequence[int], skip: bool = True) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip)
    return [decoder.step(i) for i in ids] + [decoder.flush()]


@RELAXED
@given(st.lists(st.integers(0, VOCAB - 1)), st.booleans())
def test_the_stream_equals_the_whole_for_any_ids(
    tokenizer: Tokenizer, ids: list[int], skip: bool
) -> None:
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(tokenizer, ids, skip)) == whole


@RELAXED
@given(st.binary(max_size=12))
def test_the_stream_equals_the_whole_for_any_bytes(tokenizer: Tokenizer, raw: bytes) -> None:
    chars = {byte: char for char, byte in byte_map().items()}
    vocab = tokenizer.get_vocab()
    ids = [vocab[chars[byte]] for byte in raw]
    parts = stream(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids) == raw.decode("utf-8", "replace")


def byte_map() -> dict[str, int]:
    from looptx_core.data.tokenizer import _BYTE_OF

    assert set(_BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet())
    return _BYTE_OF


def test_an_emoji_comes_whole_with_its_last_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" 🐋!").ids
    assert len(ids) == 6
    assert stream(tokenizer, ids) == [" ", "", "", "", "🐋", "!", ""]
    assert stream(tokenizer, ids[:3])[-1] == "\ufffd"
    assert stream(tokenizer, [0, 99_999]) == ["", "", ""]


def test_a_foreign_decoder_streams_too() -> None:
    foreign = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    foreign.decoder = decoders.Metaspace()
    assert stream(foreign, [0, 1, 0]) == ["a", " b", " a", ""]


# Shards


def test_shards_hold_the_documents(folder: Path, tmp_path: Path) -> None:
    manifest = tokenize_corpus([folder], tmp_path / "a" / "out", VOCAB, val_fraction=0.2)
    shards = open_shards(tmp_path / "a" / "out", verify=True)
    assert shards.manifest == manifest
    found = {}
    for split in ("train", "val"):
        tokens = shards.tokens(split)
        ids = tokens.read(0, len(tokens))
        ends = np.flatnonzero(ids == manifest.end_id)
        assert ends[-1] == len(ids) - 1
        parts = np.split(ids, ends + 1)[:-1]
        found[split] = [shards.tokenizer.decode(part[:-1].tolist()) for part in parts]
        counts = manifest.splits[split]
        assert counts.documents == len(parts)
        assert counts.tokens == len(tokens)
        assert counts.bytes == sum(len(text.encode()) for text in found[split])
    assert sorted(found["train"] + found["val"]) == sorted(text_of(i) for i in range(12))
    assert 2 <= len(found["val"]) <= 4
    assert manifest.documents == 12
    assert manifest.bytes_per_token == pytest.approx(manifest.bytes / manifest.tokens)
    assert manifest.split.rule == "few"
    assert [Path(source["name"]).name for source in manifest.inputs] == [
        *("0.txt", "1.txt", "2.txt", "3.txt", "lines.jsonl", "table.parquet")
    ]


def test_two_runs_give_the_same_bytes_and_a_seed_another_split(
    folder: Path, tmp_path: Path
) -> None:
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 7)):
        tokenize_corpus([folder], tmp_path / name, VOCAB, seed=seed)
        runs.append(contents(tmp_path / name))
    assert runs[0] == runs[1]
    assert runs[0]["val-00000.bin"] != runs[2]["val-00000.bin"]


def test_many_documents_are_split_by_hash(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = "".join(json.dumps({"text": f"number {i}."}) + "\n" for i in range(500))
    (tmp_path / "a.jsonl").write_text(lines)
    for fraction, low, high in ((0.1, 30, 75), (1e-6, 1, 1), (1 - 1e-6, 499, 499)):
        out = tmp_path / "out"
        manifest = tokenize_corpus(
            [tmp_path / "a.jsonl"], out, tokenizer=tokenizer, val_fraction=fraction, overwrite=True
        )
        assert manifest.split.rule == "hash"
        assert low <= manifest.splits["val"].documents <= high
        assert sum(counts.documents for counts in manifest.splits.values()) == 500


def test_two_documents_are_one_on_each_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").write_text("long " * 100)
    inputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for fraction in (0.001, 0.05, 0.9):
        manifest = tokenize_corpus(
            inputs, tmp_path / "o", tokenizer=tokenizer, val_fraction=fraction, overwrite=True
        )
        assert [counts.documents for counts in manifest.splits.values()] == [1, 1]


@pytest.mark.parametrize("text", [MOBY[:150_000], "word " * 40, "🐋🐋", "ab", "x" * 200_000, "é a"])
@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.999])
def test_one_document_loses_its_tail(
    tmp_path: Path, tokenizer: Tokenizer, text: str, fraction: float
) -> None:
    (tmp_path / "a.txt").write_text(text, "utf-8")
    manifest = tokenize_corpus(
        [tmp_path / "a.txt"], tmp_path / "out", tokenizer=tokenizer, val_fraction=fraction
    )
    shards = open_shards(tmp_path / "out")
    parts = {}
    for split in ("train", "val"):
        tokens = shards.tokens(split)
        parts[split] = shards.tokenizer.decode(tokens.read(0, len(tokens) - 1).tolist())
        assert len(parts[split].encode()) == manifest.splits[split].bytes > 0
    assert parts["train"] + parts["val"] == text
    assert manifest.split.rule == "tail"
    assert "tail" in manifest.split.description
    if len(text) > 10_000 and " " in text:
        assert parts["val"][0].isspace()
        assert manifest.splits["val"].bytes / manifest.bytes == pytest.approx(fraction, abs=0.001)


def test_reads_across_shard_borders(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = tmp_path / "a.txt"
    text.write_text(MOBY[:3000])
    tokenize_corpus([text], tmp_path / "one", tokenizer=tokenizer)
    manifest = tokenize_corpus([text], tmp_path / "many", tokenizer=tokenizer, shard_tokens=97)
    assert len(manifest.shards) > 10
    assert manifest.shards[0].tokens == 97
    whole = open_shards(tmp_path / "one").tokens("train")
    tokens = open_shards(tmp_path / "many", verify=True).tokens("train")
    reference = whole.read(0, len(whole))
    assert len(tokens) == len(whole)
    for start, stop in itertools.product((0, 1, 96, 97, 98, 500), (98, 194, 195, 500, len(tokens))):
        if start <= stop:
            part = tokens.read(start, stop)
            assert part.dtype == np.int64
            assert np.array_equal(part, reference[start:stop])
    assert len(tokens.read(len(tokens), len(tokens))) == 0
    for start, stop in ((-1, 3), (5, 4), (0, len(tokens) + 1)):
        with pytest.raises(IndexError):
            tokens.read(start, stop)
    copy = pickle.loads(pickle.dumps(tokens))
    assert np.array_equal(copy.read(0, len(copy)), reference)
    assert len(pickle.dumps(tokens)) < len(manifest.shards) * 300  # paths, no tokens


def test_literal_special_tokens_do_not_end_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("one <|end|> two <|pad|> three " * 20)
    tokenize_corpus([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tokenizer)
    tokens = open_shards(tmp_path / "out").tokens("train")
    ids = tokens.read(0, len(tokens))
    assert ids[-1] == 0
    assert ids[:-1].min() >= len(SPECIAL_TOKENS)


def test_large_vocabularies_take_four_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    large = load_tokenizer_of(tokenizer)
    large.add_tokens([f"<extra{i}>" for i in range(2**16)])
    (tmp_path / "a.txt").write_text("one two <extra65535>")
    manifest = tokenize_corpus([tmp_path / "a.txt"], tmp_path / "out", tokenizer=large)
    assert manifest.dtype == "<u4"
    tokens = open_shards(tmp_path / "out").tokens("val")
    assert tokens.read(0, len(tokens)).max() == VOCAB + 65535


def test_nothing_is_overwritten_unasked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "out"
    text = tmp_path / "a.txt"
    text.write_text("some words to read")
    tokenize_corpus([text], out, tokenizer=tokenizer)
    before = contents(out)
    text.write_text("some other words to read")
    with pytest.raises(UsageError, match="--overwrite"):
        tokenize_corpus([text], out, tokenizer=tokenizer)
    assert contents(out) == before
    text.write_bytes(b"\xff\xff")  # fails late, and leaves the old folder whole
    with pytest.raises(DataError):
        tokenize_corpus([text], out, tokenizer=tokenizer, overwrite=True)
    assert contents(out) == before
    text.write_text("some other words to read")
    tokenize_corpus([text], out, tokenizer=tokenizer, overwrite=True)
    assert contents(out) != before
    (out / "thesis.doc").write_text("dear")
    with pytest.raises(UsageError, match=r"thesis\.doc"):
        tokenize_corpus([text], out, tokenizer=tokenizer, overwrite=True)
    with pytest.raises(UsageError, match="not a folder"):
        tokenize_corpus([text], text, tokenizer=tokenizer, overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "out"]


def test_an_empty_folder_is_free(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "a.txt").write_text("some words")
    tokenize_corpus([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tokenizer)
    assert open_shards(tmp_path / "out")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "out"
    (tmp_path / "a.txt").write_text(MOBY[:100_000])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(LooptxError, match="cannot write") as caught:
            tokenize_corpus([tmp_path / "a.txt"], out, tokenizer=tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_corpus_that_changes_meanwhile(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some words " * 10)

    def meddle(phase: str, done: int, total: int | None) -> None:
        if phase == "read":
            text.write_text("fewer words")

    with pytest.raises(DataError, match="changed"):
        tokenize_corpus([text], tmp_path / "out", tokenizer=tokenizer, on_progress=meddle)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "bad", [{"vocab_size": 100}, {"val_fraction": 0.0}, {"val_fraction": 1.0}, {"shard_tokens": 0}]
)
def test_bad_settings(tmp_path: Path, bad: dict) -> None:
    (tmp_path / "a.txt").write_text("some words")
    with pytest.raises(UsageError):
        tokenize_corpus([tmp_path / "a.txt"], tmp_path / "out", **bad)
    assert not (tmp_path / "out").exists()


def test_damaged_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "out"
    (tmp_path / "a.txt").write_text(MOBY[:3000])
    tokenize_corpus([tmp_path / "a.txt"], out, tokenizer=tokenizer)
    good = contents(out)
    facts = json.loads(good["manifest.json"])
    data = good["train-00000.bin"]
    other = train_tokenizer([MOBY[:200_000]], VOCAB + 1).to_str().encode()

    def manifest(**changes: object) -> bytes:
        return json.dumps(facts | changes).encode()

    for name, content, told in [
        ("train-00000.bin", data[:-2], "bytes instead of"),
        ("train-00000.bin", None, "No such file"),
        ("tokenizer.json", other, "not the one"),
        ("tokenizer.json", None, "no tokenizer"),
        ("manifest.json", manifest(schema_version=99), "schema version 99"),
        ("manifest.json", manifest(shards=[]), "contradicts"),
        ("manifest.json", manifest(dtype="object"), "unknown dtype"),
        ("manifest.json", manifest(splits={}), "damaged"),
        ("manifest.json", b"[]", "damaged"),
        ("manifest.json", b"{", "damaged"),
        ("manifest.json", None, "no tokenised data"),
    ]:
        (out / name).unlink()
        if content is not None:
            (out / name).write_bytes(content)
        with pytest.raises(DataError, match=told):
            open_shards(out)
        (out / name).write_bytes(good[name])
    flipped = bytes([data[0] ^ 1]) + data[1:]
    (out / "train-00000.bin").write_bytes(flipped)
    open_shards(out)
    with pytest.raises(DataError, match="hash"):
        open_shards(out, verify=True)
    with pytest.raises(UsageError):
        open_shards(out).tokens("test")


# The cache


def test_the_cache_is_by_content(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPTX_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "a.txt"
    text.write_text(MOBY[:20_000])
    calls: list[str] = []

    def seen(phase: str, done: int, total: int | None) -> None:
        calls.append(phase)

    first = resolve_data([str(text)], VOCAB, on_progress=seen)
    assert calls
    assert first.is_relative_to(tmp_path / "cache")
    calls.clear()
    renamed = text.rename(tmp_path / "b.txt")
    assert resolve_data([str(renamed)], VOCAB, on_progress=seen) == first
    assert not calls
    assert cached_shards([renamed], VOCAB, seed=1) != first
    assert cached_shards([renamed], VOCAB + 1) != first
    assert cached_shards([renamed], tokenizer=tokenizer) != first
    shard = first / "train-00000.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:10])  # a damaged entry is made anew
    assert cached_shards([renamed], VOCAB) == first
    assert shard.read_bytes() == good
    renamed.write_text(MOBY[:20_001])
    assert resolve_data([str(renamed)], VOCAB) != first


def test_resolve_data(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOOPTX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    bundled = resolve_data(None, tokenizer=tokenizer)
    assert bundled.is_relative_to(tmp_path / "xdg" / "looptx")
    assert Manifest.read(bundled).bytes == len(MOBY.encode())
    assert resolve_data([str(bundled)]) == bundled
    assert resolve_data([str(bundled)], tokenizer=tokenizer) == bundled
    with pytest.raises(UsageError, match="alone"):
        resolve_data([str(bundled), str(bundled_text())])
    with pytest.raises(DataError, match="another tokenizer"):
        resolve_data([str(bundled)], tokenizer=train_tokenizer([MOBY[:9000]], 300))
    with pytest.raises(DataError, match="no such file"):
        resolve_data([str(tmp_path / "none")])


def test_bad_standard_input_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPTX_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    with pytest.raises(DataError, match="standard input: invalid UTF-8 at byte 2"):
        resolve_data(["-"])


def test_reading_imports_no_torch() -> None:
    code = (
        "import sys, looptx_core.data.resolve\n"
        "assert not {'torch', 'lightning', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hop_lines_answer_what_their_table_says() -> None:
    """Every query, solved by walking the printed table; probes mark just the answers."""
    for probe in hop_probes(seed=3, lines=50):
        table, queries = probe.text.removeprefix("map ").split(": ")
        arrows = dict(pair for pair in table.split())
        steps = {}
        for letter, answer in zip(*[iter(queries.split())] * 2):
            place, hops = letter, 0
            while arrows[place] != place:
                place, hops = arrows[place], hops + 1
            assert answer == place.upper()
            steps.setdefault(hops, []).append(answer)
        asked = int(probe.group.removesuffix(" hops"))
        assert [probe.text[start:end] for start, end in probe.answers] == steps[asked]
        assert set(steps) <= set(range(1, MAX_HOPS + 1))
    assert not set(hop_lines(3, 100)) & {probe.text for probe in hop_probes(3, 100)}


def test_an_arrow_of_the_bundled_lines_is_one_token() -> None:
    tokenizer = open_shards(bundled_shards(2048)).tokenizer
    line = next(hop_lines(9, 1))
    pairs = line.removeprefix("map ").split(":")[0].split()
    assert all(len(tokenizer.encode(" " + pair).ids) == 1 for pair in pairs)


def test_windows_number_their_documents(tmp_path: Path) -> None:
    out = tmp_path / "data"
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(MOBY[300 * number : 300 * number + 250])
    tokenize_corpus([tmp_path / "texts"], out, vocab_size=300)
    data = TokenData(out, seq_len=256, micro_batch=2, batches=1)
    end = data.shards.tokenizer.token_to_id(END)
    item = data.train[0]
    tokens, documents = item["tokens"][:-1], item["documents"]
    assert documents[0] == 0 and int(documents.max()) >= 1
    for place in range(1, 256):
        assert documents[place] == documents[place - 1] + int(tokens[place - 1] == end)
    assert (
        "documents"
        not in TokenData(out, seq_len=256, micro_batch=2, batches=1, document_mask=False).train[0]
    )
