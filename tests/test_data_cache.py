"""What --data names, and the cache of what was tokenised."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from data_cases import MOBY, VOCAB
from tokenizers import Tokenizer

from looptx_core.data.corpus import bundled_text
from looptx_core.data.resolve import cached_shards, resolve_data
from looptx_core.data.shards import Manifest
from looptx_core.data.tokenizer import train_tokenizer
from looptx_core.errors import DataError, UsageError


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
