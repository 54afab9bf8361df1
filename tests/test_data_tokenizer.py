"""The tokenizer: round trips, bounds, and the same from the same text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_cases import MOBY, RELAXED, VOCAB, load_tokenizer_of
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from looptx_core.data.corpus import cut_pieces
from looptx_core.data.tokenizer import (
    MIN_VOCAB,
    SPECIAL_TOKENS,
    end_id,
    fingerprint,
    load_tokenizer,
    spread_sample,
    train_tokenizer,
)
from looptx_core.errors import DataError, UsageError

pytestmark = pytest.mark.fast

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


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
