"""Finetuning data: records to examples, examples packed into sequences.

A record is `{"prompt", "response"}`, `{"messages": [{"role", "content"}, ...]}` or `{"text"}`.
Prompt and response follow each other as they are, each tokenised apart, so that what a model sees
in generation is what it saw here; a response is closed by the end token. What counts is the
response, or all of a text.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from looptx_core.data.chat import encode_chat
from looptx_core.data.corpus import Corpus
from looptx_core.data.datamodule import Batches
from looptx_core.data.tokenizer import PAD, end_id
from looptx_core.errors import DataError, UsageError

_FORMS = '{"prompt", "response"}, {"messages"} or {"text"}'


class Example(NamedTuple):
    """ids: (tokens,) int32. counted: (tokens,) bool, the tokens to learn."""

    ids: np.ndarray
    counted: np.ndarray


@dataclass
class Examples:
    """What was read, and what became of the examples longer than a sequence."""

    kept: list[Example] = field(default_factory=list)
    dropped: int = 0
    truncated: int = 0
    chat: bool = False
    """Whether any record was a conversation."""


def read_examples(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    too_long: str = "error",
    train_on_prompt: bool = False,
) -> Examples:
    """Read records and make them tokens.

    A text longer than `seq_len` is cut into several examples. Another example that is longer is an
    error, is dropped, or loses its end (`too_long`: error, drop or truncate), and one whose
    response begins beyond is dropped.

    Raises:
        DataError: an input or a record that can't be read or holds nothing to learn.
        UsageError: a long example, where these are an error.
    """
    found = Examples()
    longest, long, first = 0, 0, ""
    with Corpus(list(inputs)) as corpus:
        for where, record in corpus.records():
            if isinstance(record, dict) and "messages" in record:
                found.chat = True
            whole = isinstance(record, dict) and record.keys().isdisjoint(("prompt", "messages"))
            example = _example(record, tokenizer, where, train_on_prompt)
            if len(example.ids) <= seq_len:
                found.kept.append(example)
            elif whole:
                # One token is shared, so that each is predicted once.
                for start in range(0, len(example.ids) - 1, seq_len - 1):
                    found.kept.append(Example(*(x[start : start + seq_len] for x in example)))
            else:
                long, longest, first = long + 1, max(longest, len(example.ids)), first or where
                short = Example(*(x[:seq_len] for x in example))
                if too_long == "truncate" and short.counted.any():
                    found.kept.append(short)
                    found.truncated += 1
                else:
                    found.dropped += 1
    if long and too_long == "error":
        raise UsageError(
            f"{first}: longer than --seq-len {seq_len}, as are {long} examples in all, the longest "
            f"of {longest} tokens; pass --seq-len {longest}, or --too-long drop or truncate"
        )
    if len(found.kept) < 2:
        raise DataError(
            f"{', '.join(inputs)}: {len(found.kept)} examples to use and {found.dropped} too long; "
            "give at least 2, one of them to hold out"
        )
    return found


def _example(record: Any, tokenizer: Tokenizer, where: str, all_count: bool) -> Example:
    match record:
        case {"messages": messages}:
            ids, counted = encode_chat(messages, tokenizer, where)
        case {"prompt": str(prompt), "response": str(response)}:
            before = tokenizer.encode(prompt, add_special_tokens=False).ids or [end_id(tokenizer)]
            after = tokenizer.encode(response, add_special_tokens=False).ids
            ids = [*before, *after, end_id(tokenizer)]
            counted = [False] * len(before) + [True] * (len(after) + 1)
        case {"text": str(text)}:
            words, end = tokenizer.encode(text, add_special_tokens=False).ids, end_id(tokenizer)
            ids, counted = [end, *words, end], [True] * (len(words) + 2)
        case dict():
            has = ", ".join(f"{key}: {type(value).__name__}" for key, value in record.items())
            raise DataError(
                f"{where}: a record needs {_FORMS}, all of text; it has {has or 'no key'}"
            )
        case _:
            raise DataError(f"{where}: {type(record).__name__} is no record; write {_FORMS}")
    counts = np.ones(len(ids), bool) if all_count else np.array(counted)
    return Example(np.array(ids, np.int32), counts)


def hold_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training, held out), at least one each; equal examples stay together, or nearly."""

    def place(example: Example) -> bytes:
        return hashlib.sha256(f"{seed}:".encode() + example.ids.tobytes()).digest()

    order = sorted(examples, key=place)
    count = min(max(1, round(share * len(order))), len(order) - 1)
    return order[count:], order[:count]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Items by sequence, none over `capacity`: best fit, longest first (arXiv 2404.10830)."""
    sequences: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # sorted, those of by_room
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, lengths[item])
        if at == len(rooms):
            place, room = len(sequences), capacity
            sequences.append([])
        else:
            room = rooms[at]
            place = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        sequences[place].append(item)
        left = room - lengths[item]
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(place)
    return sequences


def padding_id(tokenizer: Tokenizer) -> int:
    """What fills a sequence up; a tokenizer of others may have the end token only."""
    padding = tokenizer.token_to_id(PAD)
    return end_id(tokenizer) if padding is None else padding


class Packed(Dataset[dict[str, Tensor]]):
    """Examples packed into sequences of `seq_len` inputs, each example to itself.

    An example attends within itself only, and its first token is no target, which the example
    before would have to predict. RoPE sees distances alone, so positions need not start anew.
    """

    def __init__(self, examples: Sequence[Example], seq_len: int, padding: int) -> None:
        self.examples, self.seq_len, self.padding = examples, seq_len, padding
        self.rows = pack([len(example.ids) for example in examples], seq_len + 1)
        counted = sum(int(example.counted[1:].sum()) for example in examples)
        self._weight = seq_len * len(self.rows) / max(1, counted)
        """Of a target that counts: 1 in the mean over all targets, padding included."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fill(self) -> float:
        """Share of the places that hold a token and no padding."""
        held = sum(len(example.ids) for example in self.examples)
        return held / (len(self.rows) * (self.seq_len + 1))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """tokens: (seq_len + 1,). ids: the number. documents, weights: (seq_len,)."""
        index %= len(self)
        return self.sequence(
            index, [(number, self.examples[number]) for number in self.rows[index]]
        )

    def sequence(self, index: int, examples: Iterable[tuple[int, Example]]) -> dict[str, Tensor]:
        """These numbered examples side by side, as sequence `index`."""
        tokens = torch.full((self.seq_len + 1,), self.padding)
        documents = torch.full((self.seq_len + 1,), -1)
        counted = torch.zeros(self.seq_len + 1)
        start = 0
        for number, example in examples:
            place = slice(start, start + len(example.ids))
            tokens[place] = torch.from_numpy(example.ids.astype(np.int64))
            documents[place] = number
            counted[place] = torch.from_numpy(example.counted.astype(np.float32))
            counted[start] = 0
            start = place.stop
        return {
            "tokens": tokens,
            "ids": torch.tensor(index),
            "documents": documents[:-1],
            "weights": counted[1:] * self._weight,
        }


class ExampleData(Batches):
    """Batches of packed examples; the other arguments are those of `Batches`."""

    train: Packed
    val: Packed

    def __init__(
        self,
        train: Sequence[Example],
        val: Sequence[Example],
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        **how: Any,
    ) -> None:
        padding = padding_id(tokenizer)
        super().__init__(Packed(train, seq_len, padding), Packed(val, seq_len, padding), **how)
