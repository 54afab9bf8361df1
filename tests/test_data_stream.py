"""Stream decoding: equal to the whole, for any ids and any bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from data_cases import RELAXED, VOCAB
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from looptx_core.data.tokenizer import StreamDecoder


def stream(
    tokenizer: Tokenizer, ids: Sequence[int], skip: bool = True, context: Sequence[int] = ()
) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip, context)
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


def spaced(before: str) -> Tokenizer:
    """One that writes a space before a text, with tokens for bytes, as Llama 2's and Gemma's."""
    words = ["<unk>", "<s>", "▁", "▁It", "▁was", "▁the", "s", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {word: i for i, word in enumerate(words)}
    found = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    found.add_special_tokens(["<s>"])
    if before == "metaspace":
        found.decoder = decoders.Metaspace(prepend_scheme="first")
        return found
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return found


@pytest.mark.parametrize("kind", ["metaspace", "strip"])
def test_a_text_goes_on_after_its_context(kind: str) -> None:
    tokenizer = spaced(kind)
    parts = stream(tokenizer, [5, 5, 6, 1, 2, 2, 5], context=[1, 3, 4])
    assert "".join(parts) == " the thes   the" and parts[:2] == [" the", " the"]
    assert "".join(stream(tokenizer, [5, 6], context=[1])) == "thes", "which has no text"


@RELAXED
@given(
    st.lists(st.integers(1, 6)),
    st.lists(st.one_of(st.integers(1, 6), st.sampled_from(["€", "🐋"]))),
)
def test_context_and_stream_joined_are_the_whole(
    context: list[int], continuation: list[int | str]
) -> None:
    tokenizer = spaced("strip")
    ids: list[int] = []
    for item in continuation:
        ids += [7 + byte for byte in item.encode()] if isinstance(item, str) else [item]
    whole = tokenizer.decode([*context, *ids])
    assert tokenizer.decode(context) + "".join(stream(tokenizer, ids, context=context)) == whole


def test_a_stop_while_standard_input_is_copied_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM before the input's end: no copy stays, and the exit code says interrupted."""

    held = tmp_path / "temporary"
    held.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "looptx_cli.main", "tokenize", "-", "--out", str(tmp_path / "out")],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(held)},
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(b"some words of a text\n" * 100_000)
    process.stdin.flush()
    deadline = time.monotonic() + 60
    copied = lambda: sum(f.stat().st_size for f in held.rglob("*") if f.is_file())  # noqa: E731
    while copied() < 1_000_000 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert copied() >= 1_000_000, "it copies"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    process.stdin.close()
    assert not list(held.iterdir()) and not (tmp_path / "out").exists()
