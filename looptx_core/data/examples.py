"""Finetuning data: records to examples, examples packed into sequences.

A record is `{"prompt", "response"}`, `{"messages": [{"role", "content"}, ...]}` or `{"text"}`.
Prompt and response follow each other as they are, each tokenised apart, so that what a model sees
in generation is what it saw here; a response is closed by the end token. What counts is the
response, or all of a text.

Each may have pictures, for a model that reads them: `image`, a path or several, of a record or of a
message. They stand where `<|image|>` is written, or come first. `{"parts"}` as in `data.pairs` too.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from looptx_core.config.model import ModelConfig
from looptx_core.data.chat import encode_chat, text_ids
from looptx_core.data.corpus import Corpus, Source
from looptx_core.data.datamodule import Batches
from looptx_core.data.pictures import measure
from looptx_core.data.tokenizer import IMAGE, PAD, end_id
from looptx_core.errors import DataError, UsageError

_FORMS = '{"prompt", "response"}, {"messages"} or {"text"}'


class Example(NamedTuple):
    """ids: (tokens,) int32. counted: (tokens,) bool, the tokens to learn."""

    ids: np.ndarray
    counted: np.ndarray
    pictures: tuple[Path, ...] = ()
    """Files, in the order of their image tokens."""

    def cut(self, start: int, stop: int) -> Example:
        """A part of it, without pictures."""
        return Example(self.ids[start:stop], self.counted[start:stop])


@dataclass
class Examples:
    """What was read, and what became of the examples longer than a sequence."""

    kept: list[Example] = field(default_factory=list)
    dropped: int = 0
    truncated: int = 0
    skipped: int = 0
    """Records that can't be used."""
    pictures: int = 0
    chat: bool = False
    """Whether any record was a conversation."""


def read_examples(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    too_long: str = "error",
    train_on_prompt: bool = False,
    skip_bad: bool = False,
    config: ModelConfig | None = None,
) -> Examples:
    """Read records and make them tokens; pictures are measured and not decoded yet.

    A text longer than `seq_len` is cut into several examples. Another example that is longer is an
    error, is dropped, or loses its end (`too_long`: error, drop or truncate), and one whose
    response begins beyond is dropped.

    skip_bad: leave out, and count, records that can't be used. config: of the model that will read
    the pictures.

    Raises:
        DataError: an input or a record that can't be read or holds nothing to learn, or one with
            pictures where the model reads none.
        UsageError: a long example, where these are an error.
    """
    found = Examples()
    longest, long, first = 0, 0, ""
    for source, where, record in _records(inputs):
        try:
            reader = _Reader(tokenizer, config, where, source.folder, train_on_prompt)
            example = reader.example(record)
        except DataError:
            if not skip_bad:
                raise
            found.skipped += 1
            continue
        found.chat |= "messages" in record
        whole = not example.pictures and record.keys().isdisjoint(("prompt", "messages"))
        if len(example.ids) <= seq_len:
            found.kept.append(example)
        elif whole:
            # One token is shared, so that each is predicted once.
            for start in range(0, len(example.ids) - 1, seq_len - 1):
                found.kept.append(example.cut(start, start + seq_len))
        else:
            long, longest, first = long + 1, max(longest, len(example.ids)), first or where
            short = reader.truncated(example, seq_len) if too_long == "truncate" else None
            if short:
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
            f"{', '.join(inputs)}: {len(found.kept)} examples to use, {found.dropped} too long, "
            f"{found.skipped} not usable; give at least 2, one of them to hold out"
        )
    found.pictures = sum(len(example.pictures) for example in found.kept)
    return found


def have_pictures(inputs: Sequence[str]) -> bool:
    """Whether the first record of a file names pictures; what can be read once is not looked at.

    Errors: those of `Corpus`.
    """
    inputs = [item for item in inputs if Path(item).is_file() or Path(item).is_dir()]
    if not inputs:
        return False
    with Corpus(inputs) as corpus:
        for source in corpus.sources:
            _, record = next(corpus.records_of(source), ("", None))
            messages = _list(record.get("messages")) if isinstance(record, dict) else []
            for part in [record, *messages]:
                if isinstance(part, dict) and (part.get("image") or part.get("parts")):
                    return True
    return False


def _records(inputs: Sequence[str]) -> Iterator[tuple[Source, str, Any]]:
    with Corpus(list(inputs)) as corpus:
        for source in corpus.sources:
            for where, record in corpus.records_of(source):
                yield source, where, record


@dataclass
class _Reader:
    """Makes an example of the record at `where`, whose paths start at `folder`."""

    tokenizer: Tokenizer
    config: ModelConfig | None
    where: str
    folder: Path
    all_count: bool

    def example(self, record: Any) -> Example:
        end = end_id(self.tokenizer)
        match record:
            case {"messages": messages}:
                files = [self._files(message) for message in _list(messages)] or [()]
                files[0] = self._files(record) + files[0]
                sizes = [self._sizes(some) for some in files]
                ids, counted = self._made(
                    encode_chat, messages, self.tokenizer, self.where, sizes, self._image
                )
                pictures = sum(files, ())
            case {"prompt": str(prompt), "response": str(response)}:
                pictures = self._files(record)
                before = self._text(prompt, pictures)
                if pictures or not before:
                    before = [end, *before]  # as generation begins
                after = [*self._text(response), end]
                ids = before + after
                counted = [False] * len(before) + [True] * len(after)
            case {"parts": [*parts]}:
                return self.example(self._joined(parts))
            case {"text": str(text)}:
                pictures = self._files(record)
                ids = [end, *self._text(text.strip() if pictures else text, pictures), end]
                counted = [token != self._image for token in ids]
            case dict():
                has = ", ".join(f"{key}: {type(value).__name__}" for key, value in record.items())
                raise DataError(
                    f"{self.where}: a record needs {_FORMS}, all of text; it has {has or 'no key'}"
                )
            case _:
                raise DataError(
                    f"{self.where}: {type(record).__name__} is no record; write {_FORMS}"
                )
        counts = np.ones(len(ids), bool) if self.all_count else np.array(counted)
        tokens = np.array(ids, np.int32)
        return Example(tokens, counts & (tokens != self._image), pictures)

    def truncated(self, example: Example, seq_len: int) -> Example | None:
        """Its first tokens, unless a picture or all that counts lies beyond."""
        short = example.cut(0, seq_len)
        lost = (example.ids[seq_len:] == self._image).any()
        return (
            short._replace(pictures=example.pictures) if short.counted.any() and not lost else None
        )

    @property
    def _image(self) -> int:
        return self.config.image_token if self.config and self.config.vision_layers else -1

    def _text(self, text: str, pictures: Sequence[Path] = ()) -> list[int]:
        ids: list[int] = self._made(
            text_ids, text, self.tokenizer, self._sizes(pictures), self._image
        )
        return ids

    def _made(self, make: Callable[..., Any], *how: Any) -> Any:
        try:
            return make(*how)
        except UsageError as error:  # of the places of pictures
            raise DataError(f"{self.where}: {error}") from error

    def _joined(self, parts: Sequence[Any]) -> dict[str, Any]:
        """Parts as a record of text with the places of its pictures."""
        images, text = [], ""
        for part in parts:
            match part:
                case {"image": str(image)}:
                    images.append(image)
                    text += IMAGE
                case {"text": str(words)}:
                    text += words.strip()
                case _:
                    raise DataError(
                        f'{self.where}: a part is {{"image": path}} or {{"text": ...}}; mend it'
                    )
        return {"image": images, "text": text}

    def _files(self, record: Any) -> tuple[Path, ...]:
        named = record.get("image") if isinstance(record, dict) else None
        images = [named] if isinstance(named, str) else named or []
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise DataError(f"{self.where}: image must be a path or several; mend this record")
        files = tuple(self.folder / image for image in images)
        for image, file in zip(images, files):
            if not file.is_file():
                raise DataError(
                    f"{self.where}: no picture {image}; mend the path, or pass --skip-bad"
                )
        return files

    def _sizes(self, files: Sequence[Path]) -> list[int]:
        """Patches of each picture."""
        if files and (self.config is None or not self.config.vision_layers):
            raise DataError(
                f"{self.where}: has a picture, and this model reads none; give one by --model "
                "that was trained on pictures"
            )
        config = cast(ModelConfig, self.config)
        return [math.prod(measure(file, config, f"{self.where}: {file}")) for file in files]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def hold_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training, held out), at least one each; equal examples stay together, or nearly."""

    def place(example: Example) -> bytes:
        files = "".join(map(str, example.pictures)).encode()
        return hashlib.sha256(f"{seed}:".encode() + example.ids.tobytes() + files).digest()

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

    def __init__(self, train: Packed, val: Packed, **how: Any) -> None:
        super().__init__(train, val, **how)

    @property
    def fingerprint(self) -> str:
        """Of all examples, those that are held out too."""
        digest = hashlib.sha256()
        for example in [*self.train.examples, *self.val.examples]:
            sizes = [(file.name, file.stat().st_size) for file in example.pictures]
            digest.update(example.ids.tobytes() + example.counted.tobytes() + repr(sizes).encode())
        return digest.hexdigest()
