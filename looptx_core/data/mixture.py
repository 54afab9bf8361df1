"""Text mixed with records of media: both tokenised, each with a part held out."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Batches of text and of records; the other arguments are those of `Batches`.

    mix: the weights of text and of records; a weight of 0 leaves the kind out. A share of the
    records is held out, those of equal text together. direction: see `in_directions`.
    """

    def __init__(
        self,
        folder: str | Path,
        records: Records,
        config: ModelConfig,
        *,
        seq_len: int,
        mix: tuple[float, float],
        skip_bad: bool = False,
        augment: bool = True,
        direction: str = "read",
        document_mask: bool = True,
        seed: int = 0,
        **how: Any,
    ) -> None:
        self.shards = open_shards(folder, verify=True)
        tokenizer = self.shards.tokenizer
        records = in_directions(records, direction, writers(config))
        examples = record_examples(records, tokenizer, config, seq_len, skip_bad)
        if len(examples) < 2:
            what = " or ".join(medium.plural for medium in records.media)
            raise DataError(f"at least 2 {what} with texts are needed, one of them to hold out")
        train, held = hold_out(
            [_texts(example) for example in examples], self.shards.manifest.split.val_fraction, seed
        )
        how_packed = (seq_len, padding_id(tokenizer), config)
        text = text_windows(folder, self.shards, seq_len, document_mask)
        self.unlabelled = unlabelled(examples)
        self.val_parts: dict[str, Sequences] = {
            TEXT: text[1],
            RECORDS: PackedExamples([examples[i] for i in sorted(held)], *how_packed),
        }
        trained = PackedExamples([examples[i] for i in sorted(train)], *how_packed, seed, augment)
        kinds: list[Sequences] = [text[0], trained]
        used = [(kind, weight) for kind, weight in zip(kinds, mix) if weight]
        mixture = Mixture([kind for kind, _ in used], [weight for _, weight in used], seed)
        val = cast(Sequences, ConcatDataset(cast(Any, list(self.val_parts.values()))))
        super().__init__(mixture, val, seed=seed, **how)


def _texts(example: Example) -> bytes:
    """What an example is held out by: its group, else what it says, or its items if nothing."""
    if example.group is not None:
        return example.group.encode()
    if all(way.counted.sum() <= 1 for way in example.ways):
        return repr([file.identity for file in example.files]).encode()
    return b"".join(way.ids[way.counted].tobytes() for way in example.ways)
