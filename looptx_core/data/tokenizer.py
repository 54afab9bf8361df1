"""Byte-level BPE: training in bounded memory, loading, and decoding a stream of tokens."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from looptx_core.documents import read_text
from looptx_core.errors import DataError, UsageError

END, PAD, IMAGE = "<|end|>", "<|pad|>", "<|image|>"
USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
# Their ids are their places here, for good: shards and models depend on them.
SPECIAL_TOKENS = (
    *(END, PAD, IMAGE, USER, ASSISTANT, SYSTEM),
    *(f"<|reserved_{i}|>" for i in range(10)),
)
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)
_FOREIGN_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # GPT-2, Llama, Gemma

MOST_TOKENS = 1 << 24
"""Token ids of a tokenizer; the largest vocabularies in use have some 2^18."""
_LARGEST_FILE = 256 << 20
"""Bytes of a tokenizer.json; Gemma 3's has 33 million."""
SAMPLE_BYTES = 64 << 20  # the most text that the trainer sees
SAMPLE_UNIQUE = 8 << 20  # bytes of different words: the trainer's memory is some 60 times that
_LONGEST_WORD = 256  # characters; the trainer's time is quadratic in a word's length
_LONGEST_TOKEN = 32  # bytes
_WORD = re.compile(rf"\s?\S{{1,{_LONGEST_WORD - 1}}}|\s{{1,{_LONGEST_WORD}}}")
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD}}}|\s{{{_LONGEST_WORD}}}")


class SmallTextError(DataError):
    """A text does not support so large a vocabulary. largest: the one that it does, tokens."""

    def __init__(self, largest: int, asked: int, mend: str = "") -> None:
        self.largest, self.asked = largest, asked
        mend = mend or f"use `vocab_size` {largest} or give more text"
        super().__init__(
            f"the text supports a vocabulary of at most {largest} tokens, not {asked}; {mend}"
        )


def train_tokenizer(
    pieces: Iterable[str],
    vocab_size: int,
    *,
    sample_bytes: int = SAMPLE_BYTES,
    sample_unique: int = SAMPLE_UNIQUE,
) -> Tokenizer:
    """Learn a vocabulary from a stream of text, which is read to its end.

    Args:
        pieces: the text; equal pieces give an equal tokenizer.
        vocab_size: tokens, the special ones included.
        sample_bytes, sample_unique: bounds of the sample; see `spread_sample`.
    Raises:
        UsageError: `vocab_size` has no room for all bytes and the special tokens.
        SmallTextError: the text does not support so large a vocabulary.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=_LONGEST_TOKEN,
        show_progress=False,
    )
    sample = spread_sample(pieces, sample_bytes, sample_unique)
    tokenizer.train_from_iterator(_without_long_words(sample), trainer)
    if (largest := tokenizer.get_vocab_size()) < vocab_size:
        raise SmallTextError(largest, vocab_size)
    return as_plain_text(tokenizer)


def check_vocab_size(vocab_size: int) -> None:
    """Raise UsageError for a vocabulary too small to hold all bytes and the special tokens."""
    if vocab_size < MIN_VOCAB:
        raise UsageError(
            f"`vocab_size` {vocab_size} is too small; 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens need at least {MIN_VOCAB}"
        )


def spread_sample(
    pieces: Iterable[str], max_bytes: int = SAMPLE_BYTES, max_unique: int = SAMPLE_UNIQUE
) -> list[str]:
    """Every 2^k-th piece of a stream, with the least k that keeps the sample within its bounds.

    Args:
        max_bytes: bytes of text.
        max_unique: bytes of different words.
    """
    sample: list[str] = []
    words: set[str] = set()
    size = unique = 0
    stride = 1

    def count(piece: str) -> None:
        nonlocal size, unique
        new = set(_WORD.findall(piece)) - words
        words.update(new)
        size += len(piece.encode())
        unique += len("".join(new).encode())

    for number, piece in enumerate(pieces):
        if number % stride:
            continue
        sample.append(piece)
        count(piece)
        while (size > max_bytes or unique > max_unique) and len(sample) > 1:
            del sample[1::2]
            stride *= 2
            size = unique = 0
            words.clear()
            for kept in sample:
                count(kept)
    return sample


def load_tokenizer(path: str | os.PathLike[str], mend: str = "give a tokenizer.json") -> Tokenizer:
    """Read a `tokenizer.json`, or the one in a folder.

    mend: the remedy, the end of an error's line.

    Raises:
        DataError: there is none, or it is something else.
    """
    file = Path(path)
    if file.is_dir():
        file /= "tokenizer.json"
    if not file.exists():
        raise DataError(f"{file.parent}: no tokenizer, {file.name} is missing; {mend}")
    text = read_text(file, most=_LARGEST_FILE, mend=mend)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).splitlines()[0]
        raise DataError(f"{file}: not a tokenizer ({reason}); {mend}") from error
    if (size := vocabulary_size(tokenizer)) > MOST_TOKENS:
        raise DataError(f"{file}: its largest token id is {size - 1:,}, and the limit is "
                        f"{MOST_TOKENS - 1:,}; {mend}")  # fmt: skip
    return as_plain_text(tokenizer)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest token id and 1, which is more than the tokens where ids have holes."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int, where: str) -> None:
    """Raise `DataError` for a token id outside of a vocabulary: nothing may look such a one up."""
    if not len(ids):
        return
    array = np.asarray(ids, np.int64)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise DataError(
            f"{where}: the token id {wrong} is not below {vocab_size}, the size of the vocabulary; "
            "use the tokenizer and the data that belong to the model"
        )


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of all that decides which tokens a text becomes."""
    settings = json.loads(tokenizer.to_str())
    for passing in ("truncation", "padding"):  # of a call, not of the vocabulary
        settings.pop(passing, None)
    canonical = json.dumps(settings, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def opening_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer's post-processor puts before a text, such as its BOS."""
    if not tokenizer.num_special_tokens_to_add(False):
        return []
    found = tokenizer.encode("a")
    ours = itertools.takewhile(lambda pair: pair[1], zip(found.ids, found.special_tokens_mask))
    return [token for token, _ in ours]


def end_id(tokenizer: Tokenizer, ends: Sequence[int] = ()) -> int:
    """The id of the token that ends a document. ends: others that a model's texts end with.

    Raises:
        DataError: the tokenizer has none that we know.
    """
    for name in (END, *_FOREIGN_ENDS):
        if (found := tokenizer.token_to_id(name)) is not None:
            return int(found)
    if ends:
        return ends[0]
    raise DataError(f"the tokenizer has no token that ends a document; add '{END}' to it")


class StreamDecoder:
    """Turns token ids into text one at a time; the joined parts equal `decode` of all ids.

    context: ids that stand before them, whose text is not repeated: the text of both joined equals
    `decode` of both. It matters for tokenizers that drop the space before the first word.
    A token that completes no character gives '', and the one that completes it the whole.
    The library's own `DecodeStream` holds back bytes that are no UTF-8 and has no flush.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._special = {
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special and skip_special_tokens
        }
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # A foreign decoder has no state of its own: the last ids, and how many of them were given.
        self._ids = [] if self._byte_level else list(context)
        self._given = len(self._ids)

    def step(self, token_id: int) -> str:
        """The text that this token completes."""
        if not self._byte_level:
            return self._foreign(token_id)
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special:
            return ""
        return self._utf8.decode(token_bytes(token))

    def flush(self) -> str:
        """What remains at the end: U+FFFD for a character that was never completed."""
        if self._byte_level:
            return self._utf8.decode(b"", final=True)
        return self._decode(self._ids)[len(self._decode(self._ids[: self._given])) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)

    def _foreign(self, token_id: int) -> str:
        self._ids.append(token_id)
        before, text = self._decode(self._ids[: self._given]), self._decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        # The next ids need some text before them, and no more than that.
        if self._decode(self._ids[self._given :]):
            del self._ids[: self._given]
        self._given = len(self._ids)
        return text[len(before) :]


def token_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for."""
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:  # an added token, written as it is
        return token.encode()


def _byte_map() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


_BYTE_OF = _byte_map()


def as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """Make '<|end|>' in a text just these characters, and no call cut or padded."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_long_words(pieces: Sequence[str]) -> Iterator[str]:
    for piece in pieces:
        if _LONG_WORD.search(piece):
            yield from _WORD.findall(piece)
        else:
            yield piece
