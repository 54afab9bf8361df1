"""Text mixed with records of media: both tokenised, each with a part held out."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from looptx_core.config.model import ModelConfig
from looptx_core.data.batches import Sequences, text_windows
from looptx_core.data.datamodule import Batches
from looptx_core.data.directions import in_directions
from looptx_core.data.example import Example, unlabelled
from looptx_core.data.examples import (
    PackedExamples,
    encode_record,
    padding_id,
)
from looptx_core.data.records import Records
from looptx_core.data.shards import open_shards
from looptx_core.data.split import hold_out
from looptx_core.errors import DataError
from looptx_core.media.registry import writers

TEXT, RECORDS = "text", "records"
"""The parts of a validation."""


def record_examples(
    records: Records,
    tokenizer: Tokenizer,
    config: ModelConfig,
    seq_len: int,
    skip_bad: bool = False,
) -> list[Example]:
    """Examples of records, in their order.

    Raises `DataError` for an item that can't be read and a record longer than `seq_len`;
    skip_bad: those are left out and counted in `records`.
    """
    examples = []
    for record in records.records:
        try:
            example = encode_record(record, tokenizer, config)
            if len(example.ids) > seq_len + 1:
                what = " and ".join(medium.plural for medium in records.media)
                raise DataError(
                    f"{record.where}: {len(example.ids)} tokens with its {what}, over `seq_len` "
                    f"{seq_len}; raise `seq_len`, or pass `skip_bad`"
                )
        except DataError:
            if not skip_bad:
                raise
            records.skipped += 1
            continue
        examples.append(example)
    return examples


class Mixture(Dataset[dict[str, Tensor]]):
    """Several kinds of sequences by weight; an epoch ends when the first of them is used up.

    The others go on in the next epoch where they stopped, each in orders of its own.
    """

    def __init__(self, parts: Sequence[Sequences], weights: Sequence[float], seed: int) -> None:
        self.parts, self.seed = parts, seed
        unit = min(len(part) / weight for part, weight in zip(parts, weights))
        self.shares = [max(1, round(weight * unit)) for weight in weights]
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return sum(self.shares)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, len(self))
        kind = 0
        while place >= self.shares[kind]:
            place -= self.shares[kind]
            kind += 1
        part = self.parts[kind]
        its_epoch, position = divmod(epoch * self.shares[kind] + place, len(part))
        key = (kind, its_epoch)
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != kind}
            self._orders[key] = np.random.default_rng((self.seed, *key)).permutation(len(part))
        item = part[its_epoch * len(part) + int(self._orders[key][position])]
        return item | {"ids": item["ids"] * len(self.parts) + kind}


class MixedData(Batches):
    """Batches of texts and of records by weight; the other arguments are those of `Batches`.

    folder: shards, or several folders of them, of one tokenizer. records: those of one source, or
    of several. mix: a weight for each source, texts first; a weight of 0 leaves it out. A share of
    the records is held out, those of equal text together. direction: see `in_directions`.
    held_out_only: nothing will be trained, so that only what is held out is encoded where all
    records name their group, as those that are written do: a codec takes 20 ms for each.

    Raises `DataError` for texts of different tokenizers, and for too few records.
    """

    def __init__(
        self,
        folder: str | Path | Sequence[Path],
        records: Records | Sequence[Records],
        config: ModelConfig,
        *,
        seq_len: int,
        mix: Sequence[float],
        skip_bad: bool = False,
        augment: bool = True,
        direction: str = "read",
        document_mask: bool = True,
        seed: int = 0,
        held_out_only: bool = False,
        **how: Any,
    ) -> None:
        folders = [folder] if isinstance(folder, str | Path) else list(folder)
        sources = [records] if isinstance(records, Records) else list(records)
        self.texts = [open_shards(each, verify=True) for each in folders]
        self.shards = self.texts[0]
        for where, text in zip(folders, self.texts):
            if text.manifest.tokenizer != self.shards.manifest.tokenizer:
                raise DataError(
                    f"{where}: made with another tokenizer than {folders[0]}; tokenise it again "
                    "with that one"
                )
        windows = [
            text_windows(where, text, seq_len, document_mask)
            for where, text in zip(folders, self.texts)
        ]
        kinds: list[Sequences] = [train for train, _ in windows]
        self.val_parts: dict[str, Sequences] = {TEXT: _joined([val for _, val in windows])}
        self.unlabelled: dict[str, int] = {}
        if sources:
            turned = [in_directions(each, direction, writers(config)) for each in sources]
            trained, held = self._records(
                turned, config, seq_len, skip_bad, augment, seed, held_out_only
            )
            kinds += trained
            self.val_parts[RECORDS] = held
        train: Sequences = []
        if not held_out_only:
            used = [(kind, weight) for kind, weight in zip(kinds, mix, strict=True) if weight]
            train = Mixture([kind for kind, _ in used], [weight for _, weight in used], seed)
        super().__init__(train, _joined(list(self.val_parts.values())), seed=seed, **how)

    def _records(
        self,
        sources: Sequence[Records],
        config: ModelConfig,
        seq_len: int,
        skip_bad: bool,
        augment: bool,
        seed: int,
        held_out_only: bool,
    ) -> tuple[list[Sequences], Sequences]:
        """The sequences to train on, of each source, and those that are held out."""
        tokenizer, fraction = self.shards.tokenizer, self.shards.manifest.split.val_fraction
        how = (seq_len, padding_id(tokenizer), config)
        groups = [record.group for records in sources for record in records.records]
        if held_out_only and len(groups) > 1 and None not in groups:
            _, chosen = hold_out([str(group).encode() for group in groups], fraction, seed)
            judged = [
                example
                for records in _only(sources, chosen)
                for example in record_examples(records, tokenizer, config, seq_len, skip_bad)
            ]
            if not judged:
                raise DataError("none of the records that are held out can be used; give others")
            return [], PackedExamples(judged, *how)
        examples: list[Example] = []
        ends = []  # of each source among the examples
        for records in sources:
            examples += record_examples(records, tokenizer, config, seq_len, skip_bad)
            ends.append(len(examples))
        if len(examples) < 2:
            media = {medium.plural for records in sources for medium in records.media}
            what = " or ".join(sorted(media))
            raise DataError(f"at least 2 {what} with texts are needed, one of them to hold out")
        self.unlabelled = unlabelled(examples)
        train, held = hold_out([_texts(example) for example in examples], fraction, seed)
        trained: list[Sequences] = []
        for start, end in zip([0, *ends], ends):
            own = [examples[i] for i in sorted(train) if start <= i < end]
            if not own:
                raise DataError("a source of records has none left to train on; give it more")
            trained.append(PackedExamples(own, *how, seed, augment))
        return trained, PackedExamples([examples[i] for i in sorted(held)], *how)


def _only(sources: Sequence[Records], chosen: Collection[int]) -> Iterator[Records]:
    """The sources with only those records whose number, counted over all of them, is chosen."""
    numbers, wanted = itertools.count(), set(chosen)
    for records in sources:
        kept = [record for record in records.records if next(numbers) in wanted]
        yield replace(records, records=kept)


def _joined(parts: Sequence[Sequences]) -> Sequences:
    """The sequences of all parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return cast(Sequences, ConcatDataset(cast(Any, list(parts))))


def _texts(example: Example) -> bytes:
    """What an example is held out by: its group, else what it says, or its items if nothing."""
    if example.group is not None:
        return example.group.encode()
    if all(way.counted.sum() <= 1 for way in example.ways):
        return repr([file.identity for file in example.files]).encode()
    return b"".join(way.ids[way.counted].tobytes() for way in example.ways)
