"""Records to examples, and examples packed into sequences.

Prompt and response follow each other as they are, each tokenised apart, so that what a model sees
in generation is what it saw here; a response is closed by the end token. The response counts, or
all of a text; items of media that are read never do.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from looptx_core.config.model import ModelConfig
from looptx_core.data.chat import ChatTemplate
from looptx_core.data.datamodule import Batches
from looptx_core.data.encode_record import encode_record
from looptx_core.data.example import Example, code_ranges, target_weights
from looptx_core.data.records import parse, raw_records, rename_columns
from looptx_core.data.split import hold_out
from looptx_core.data.tokenizer import PAD, end_id
from looptx_core.errors import DataError, UsageError
from looptx_core.media.batch import MediaItem, batch_items, to_entries
from looptx_core.media.registry import MEDIA


@dataclass
class Examples:
    """What was read, and what became of the examples longer than a sequence."""

    kept: list[Example] = field(default_factory=list)
    dropped: int = 0
    truncated: int = 0
    skipped: int = 0
    """Records that can't be used."""
    media: Counter[str] = field(default_factory=Counter)
    """The items that are read, by medium."""
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
    columns: Sequence[str] = (),
    chat: ChatTemplate | None = None,
    end: int | None = None,
) -> Examples:
    """Read records and make them tokens; items are measured and not decoded yet.

    A text longer than `seq_len` is cut into several examples. Another example that is longer is an
    error, is dropped, or loses its end (`too_long`: error, drop or truncate), and one whose
    response begins beyond is dropped.

    skip_bad: leave out, and count, records that can't be used. config: of the model that will read
    the items. columns: as of `FinetuneConfig`. chat: the template of conversations; by default
    ours. end: of a response, as for `encode_record`.

    Raises:
        DataError: an input or a record that can't be read or holds nothing to learn, or one with
            an item where the model reads none.
        UsageError: a long example, where these are an error.
    """
    found = Examples()
    longest, long, first = 0, 0, ""
    for where, folder, raw in raw_records(inputs):
        try:
            record = parse(rename_columns(raw, columns, where), where, folder)
            example = encode_record(record, tokenizer, config, train_on_prompt, chat, end)
        except DataError:
            if not skip_bad:
                raise
            found.skipped += 1
            continue
        found.chat |= record.form == "messages"
        whole = record.form == "text" and not record.files
        if len(example.ids) <= seq_len:
            found.kept.append(example)
        elif whole:
            # One token is shared, so that each is predicted once.
            for start in range(0, len(example.ids) - 1, seq_len - 1):
                found.kept.append(example.cut(start, start + seq_len))
        else:
            long, longest, first = long + 1, max(longest, len(example.ids)), first or where
            short = _truncated(example, seq_len, config) if too_long == "truncate" else None
            if short:
                found.kept.append(short)
                found.truncated += 1
            else:
                found.dropped += 1
    if long and too_long == "error":
        raise UsageError(
            f"{first}: longer than `seq_len` {seq_len}, as are {long} examples in all, the longest "
            f"of {longest} tokens; pass `seq_len` {longest}, or `too_long` drop or truncate"
        )
    if len(found.kept) < 2:
        raise DataError(
            f"{', '.join(inputs)}: {len(found.kept)} examples to use, {found.dropped} too long, "
            f"{found.skipped} not usable; give at least 2, one of them to hold out"
        )
    found.media.update(file.medium for example in found.kept for file in example.files)
    return found


def _truncated(example: Example, seq_len: int, config: ModelConfig | None) -> Example | None:
    """Its first tokens, unless an item or all that counts lies beyond."""
    short = example.cut(0, seq_len)
    read = [MEDIA[file.medium].token(config) for file in example.files] if config else []
    if not short.counted.any() or np.isin(example.ids[seq_len:], read).any():
        return None
    return short._replace(files=example.files, group=example.group, grids=example.grids)


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


class PackedExamples(Dataset[dict[str, Tensor]]):
    """Examples packed into sequences of `seq_len` inputs, each example to itself.

    An example attends within itself only, and its first token is no target, which the example
    before would have to predict. RoPE sees distances alone, so positions need not start anew.
    Items of media are decoded here, in the loader's workers.

    config: of the model that reads the items. seed: for choosing one text of each example in each
    epoch; absent: its longest. augment: vary each item in each epoch too.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        seq_len: int,
        padding: int,
        config: ModelConfig | None = None,
        seed: int | None = None,
        augment: bool = False,
    ) -> None:
        self.examples, self.seq_len, self.padding = examples, seq_len, padding
        self.config, self.seed, self.augment = config, seed, augment
        self.rows = pack([self._room(example) for example in examples], seq_len + 1)
        self._codes = code_ranges(config)
        counted = float(sum(target_weights(example, self._codes)[1:].sum() for example in examples))
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
        """tokens: (seq_len + 1,). ids: the number. documents, weights: (seq_len,). And the items as
        in `media.batch.to_entries`."""
        epoch, index = divmod(index, len(self))
        texts, items = [], []
        for number in self.rows[index]:
            example, rng = self.examples[number], None
            if self.seed is not None and (example.files or example.others):
                rng = np.random.default_rng((self.seed, epoch, number))
                if example.others:
                    example = example.ways[int(rng.integers(len(example.ways)))]
            if example.files:
                example, read = self._decoded(example, rng if self.augment else None)
                items += read
            texts.append((number, example))
        return self.sequence(index, texts) | to_entries(batch_items(items))

    def _room(self, example: Example) -> int:
        """The tokens that it may take once its items are changed for training."""
        more = 0
        for file, grid in zip(example.files, example.grids):
            medium = MEDIA[file.medium]
            more += medium.longest(grid) - medium.length(grid) if self.augment else 0
        return min(len(example.ids) + more, max(len(example.ids), self.seq_len + 1))

    def _decoded(
        self, example: Example, draw: np.random.Generator | None
    ) -> tuple[Example, list[MediaItem]]:
        """An example that fits its items, and these, with their labels. draw: changes of them."""
        assert self.config is not None, "items come with the configuration of their reader"
        items: list[MediaItem] = []
        room = self._room(example)
        for file, grid in zip(example.files, example.grids):
            medium, blank = MEDIA[file.medium], None
            if draw is not None and example.said is not None:
                blank = medium.blank(grid, self.config, draw)
            if blank is not None:
                example = example.without_text()
            items.append(blank or medium.read(file.path, self.config, augment=draw))
        fitted = example.fitted(items, self.config)
        if len(fitted.ids) > room:
            assert draw is not None, "an item is no longer than it was measured"
            return self._decoded(example, None)
        if example.said is not None:
            label = MEDIA[items[0].medium].label(example.said, items[0].grid)
            items = [items[0]._replace(label=label)]
        return fitted, items

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
            counted[place] = torch.from_numpy(target_weights(example, self._codes))
            counted[start] = 0
            start = place.stop
        return {
            "tokens": tokens,
            "ids": torch.tensor(index),
            "documents": documents[:-1],
            "weights": counted[1:] * self._weight,
        }


def split_packed(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    seq_len: int,
    val_fraction: float,
    seed: int,
    augment: bool = False,
) -> tuple[PackedExamples, PackedExamples]:
    """Examples to train on and to judge by, packed.

    seed: of the choice, and of what is drawn anew in each epoch of training.
    """
    # A few examples many times over are a finetuning too, which needs some of each.
    grouped = any(example.group is not None for example in examples)
    keys = [_key(example) for example in examples]
    train, val = (
        [examples[i] for i in part] for part in hold_out(keys, val_fraction, seed, whole=grouped)
    )
    shape = (seq_len, padding_id(tokenizer), config)
    return PackedExamples(train, *shape, seed, augment), PackedExamples(val, *shape)


def _key(example: Example) -> bytes:
    """What an example is held out by: its group, else all that it holds."""
    if example.group is not None:
        return example.group.encode()
    return example.ids.tobytes() + "".join(repr(file.identity) for file in example.files).encode()


class ExampleData(Batches):
    """Batches of packed examples; the other arguments are those of `Batches`."""

    train: PackedExamples
    val: PackedExamples

    @property
    def fingerprint(self) -> str:
        """Of all examples, those that are held out too."""
        digest = hashlib.sha256()
        for example in [*self.train.examples, *self.val.examples]:
            files = repr([file.identity for file in example.files]).encode()
            for way in example.ways:
                digest.update(way.ids.tobytes() + way.counted.tobytes() + files)
        return digest.hexdigest()
