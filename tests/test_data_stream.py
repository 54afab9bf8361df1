"""Stream decoding: equal to the whole, for any ids and any bytes."""

from __future__ import annotations

from collections.abc import Sequence

from data_cases import RELAXED, VOCAB
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from looptx_core.data.tokenizer import StreamDecoder


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
