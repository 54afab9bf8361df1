"""Shards: what they hold, how they are split, and what damages them."""

from __future__ import annotations

import itertools
import json
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import MOBY, VOCAB, load_tokenizer_of, text_of
from tokenizers import Tokenizer

from looptx_core.data.shard_writer import tokenize_corpus
from looptx_core.data.shards import open_shards
from looptx_core.data.tokenizer import SPECIAL_TOKENS, train_tokenizer
from looptx_core.errors import DataError, LooptxError, UsageError


def contents(root: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in root.iterdir()}


def test_shards_hold_the_documents(texts: Path, tmp_path: Path) -> None:
    manifest = tokenize_corpus([texts], tmp_path / "a" / "out", VOCAB, val_fraction=0.2)
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


def test_two_runs_give_the_same_bytes_and_a_seed_another_split(texts: Path, tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 7)):
        tokenize_corpus([texts], tmp_path / name, VOCAB, seed=seed)
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
    with pytest.raises(UsageError, match="`overwrite`"):
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


def test_a_token_beyond_the_vocabulary_is_found(shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "s")
    file = folder / "train-00000.bin"
    raw = bytearray(file.read_bytes())
    raw[200:202] = b"\xff\xff"
    file.write_bytes(raw)
    tokens = open_shards(folder).tokens("train")
    assert len(tokens.read(0, 100)) == 100
    with pytest.raises(DataError, match=r"train-00000\.bin: the token id 65535 is not below 400"):
        tokens.read(90, 110)


BAD_FACTS: dict[str, tuple[dict[str, Any], str]] = {
    "a file elsewhere": ({"file": "../x.bin"}, "no file beside it"),
    "a size as text": ({"tokens": "many"}, "tokens: expected a whole number"),
    "no tokens": ({"tokens": 0}, "holds 0 tokens"),
}


@pytest.mark.parametrize("case", BAD_FACTS)
def test_a_manifest_that_lies(shards: Path, tmp_path: Path, case: str) -> None:
    changes, message = BAD_FACTS[case]
    folder = shutil.copytree(shards, tmp_path / "s")
    facts = json.loads((folder / "manifest.json").read_text())
    facts["shards"][0] |= changes
    (folder / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match=message):
        open_shards(folder)
    facts = json.loads((shards / "manifest.json").read_text()) | {"vocab_size": 300}
    (folder / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="contradicts the tokenizer"):
        open_shards(folder)


def test_a_shard_that_links_out_of_its_folder(shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "s")
    (folder / "train-00000.bin").rename(tmp_path / "elsewhere.bin")
    (folder / "train-00000.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(DataError, match="leads out of"):
        open_shards(folder)
