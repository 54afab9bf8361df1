"""Pictures with texts, for training: read, made examples, held out, decoded when needed.

An input is a JSON-lines file of `{"image": path, "text": ...}` (or several paths in `image`, or
`{"parts": [{"image": path}, {"text": ...}, ...]}`), or a folder with X.png beside X.txt. Paths
are relative to the file. What counts is the text; pictures are given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from looptx_core.config.model import ModelConfig
from looptx_core.data.corpus import PICTURES, Corpus
from looptx_core.data.datamodule import Batches, Sequences, text_windows
from looptx_core.data.examples import Example, Packed, padding_id
from looptx_core.data.pictures import measure, read_picture, together
from looptx_core.data.shards import open_shards
from looptx_core.data.tokenizer import end_id
from looptx_core.errors import DataError, UsageError

VISION_LAYERS = 4
"""Blocks of the encoder that a model gets where pictures come and nothing else is said."""

Part = Path | str
"""A picture or a text, in the order of a record."""


@dataclass
class Pairs:
    """What was read: each record's parts with where they stand, and how many were left out."""

    records: list[tuple[str, list[Part]]] = field(default_factory=list)
    skipped: int = 0

    def texts(self) -> Iterator[str]:
        """All text, for a tokenizer."""
        for _, parts in self.records:
            yield " ".join(part for part in parts if isinstance(part, str))


def is_pairs(item: str | Path) -> bool:
    """Whether an input holds pictures: a folder with some, or JSON lines that name some."""
    path = Path(item)
    if path.is_dir():
        return any(file.suffix.lower() in PICTURES for file in path.rglob("*"))
    if path.suffix.lower() in (".jsonl", ".ndjson") and path.is_file():
        try:
            with path.open(encoding="utf-8") as file:
                first = json.loads(next((line for line in file if line.strip()), "{}"))
        except (OSError, ValueError):
            return False
        return isinstance(first, dict) and not first.keys().isdisjoint(("image", "parts"))
    return False


def read_pairs(inputs: Sequence[str | Path], skip_bad: bool = False) -> Pairs:
    """Read records; pictures are looked for and not opened yet.

    skip_bad: leave out, and count, records that can't be used.
    Raises `DataError` for a record without picture or text or with a missing picture.
    """
    found = Pairs()
    for item in inputs:
        path = Path(item)
        for where, record in _folder(path) if path.is_dir() else _lines(path):
            try:
                found.records.append((where, _parts(record, path, where)))
            except DataError:
                if not skip_bad:
                    raise
                found.skipped += 1
    if not found.records:
        raise DataError(
            f"{', '.join(map(str, inputs))}: no pictures with texts; see docs/images.md"
        )
    return found


def mix_of(text: str) -> tuple[float, float]:
    """'2:1' as the weights of text and of pictures. Raises `UsageError`."""
    try:
        words, pictures = (float(part) for part in text.split(":"))
    except ValueError:
        words = pictures = -1.0
    if not (0 <= words < 1e6 and 0 < pictures < 1e6):
        raise UsageError(f"--mix {text}: give the weights of text and of pictures, as 1:1 or 0:1")
    return words, pictures


def _folder(folder: Path) -> Iterator[tuple[str, Any]]:
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in PICTURES and not file.name.startswith("."):
            text = file.with_suffix(".txt")
            try:
                lines = text.read_text("utf-8").strip()
            except FileNotFoundError:
                lines = None
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{text}: not readable as UTF-8; convert the file") from error
            yield str(file), {"image": str(file.resolve()), "text": lines}


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    with Corpus([file]) as corpus:
        yield from corpus.records()


def _parts(record: Any, base: Path, where: str) -> list[Part]:
    match record:
        case {"parts": [*parts]}:
            listed = [part for part in parts if isinstance(part, dict)]
        case {"image": str(image), "text": str(text)}:
            listed = [{"image": image}, {"text": text}]
        case {"image": [*images], "text": str(text)}:
            listed = [*({"image": image} for image in images), {"text": text}]
        case _:
            listed = []
    out: list[Part] = []
    for part in listed:
        match part:
            case {"image": str(image)}:
                path = Path(image) if Path(image).is_absolute() else base.parent / image
                if not path.is_file():
                    raise DataError(
                        f"{where}: no picture {image}; mend the path, or pass --skip-bad"
                    )
                out.append(path)
            case {"text": str(text)} if text.strip():
                out.append(text.strip())
    if not {Path, str} <= {Path if isinstance(p, Path) else str for p in out}:
        raise DataError(
            f'{where}: needs a picture and a text, as {{"image": path, "text": ...}}; mend it, '
            "or pass --skip-bad"
        )
    return out


def pair_examples(
    pairs: Pairs, tokenizer: Tokenizer, config: ModelConfig, seq_len: int, skip_bad: bool = False
) -> tuple[list[Example], list[list[Path]]]:
    """Examples and the pictures of each. The end token stands before and after a record.

    Raises `DataError` for a picture that can't be read and a record longer than `seq_len`;
    skip_bad: those are left out and counted in `pairs`.
    """
    end = end_id(tokenizer)
    examples, pictures = [], []
    for where, parts in pairs.records:
        ids, counted = [end], [False]
        try:
            for part in parts:
                if isinstance(part, Path):
                    rows, columns = measure(part, config, f"{where}: {part}")
                    new, text = [config.image_token] * (rows * columns), False
                else:
                    new, text = tokenizer.encode(part, add_special_tokens=False).ids, True
                ids += new
                counted += [text] * len(new)
            if len(ids) > seq_len:
                raise DataError(
                    f"{where}: {len(ids) + 1} tokens with its pictures, over --seq-len {seq_len}; "
                    "raise --seq-len, or pass --skip-bad"
                )
        except DataError:
            if not skip_bad:
                raise
            pairs.skipped += 1
            continue
        examples.append(Example(np.array([*ids, end], np.int32), np.array([*counted, True])))
        pictures.append([part for part in parts if isinstance(part, Path)])
    return examples, pictures


class PicturePacked(Packed):
    """`Packed` for examples with pictures, which are decoded here, in the loader's workers.

    pictures: the files of each example. augment: a seed to draw each picture anew, in each epoch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        pictures: Sequence[Sequence[Path]],
        seq_len: int,
        padding: int,
        config: ModelConfig,
        augment: int | None = None,
    ) -> None:
        super().__init__(examples, seq_len, padding)
        self.pictures, self.config, self.augment = pictures, config, augment

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """As `Packed`'s, with patches and grids as in `Pictures`."""
        epoch, place = divmod(index, len(self))
        found = [
            read_picture(path, self.config, augment=self._draw(epoch, number))
            for number in self.rows[place]
            for path in self.pictures[number]
        ]
        item = super().__getitem__(place)
        if pictures := together(found):
            item |= {"patches": pictures.patches, "grids": pictures.grids}
        return item

    def _draw(self, epoch: int, number: int) -> np.random.Generator | None:
        return (
            None if self.augment is None else np.random.default_rng((self.augment, epoch, number))
        )


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
    """Batches of text and of pairs; the other arguments are those of `Batches`.

    mix: the weights of text and of pairs; a weight of 0 leaves the kind out. A share of the pairs
    is held out, records of equal text together.
    """

    def __init__(
        self,
        folder: str | Path,
        pairs: Pairs,
        config: ModelConfig,
        *,
        seq_len: int,
        mix: tuple[float, float],
        skip_bad: bool = False,
        augment: bool = True,
        document_mask: bool = True,
        seed: int = 0,
        **how: Any,
    ) -> None:
        self.shards = open_shards(folder)
        tokenizer = self.shards.tokenizer
        examples, pictures = pair_examples(pairs, tokenizer, config, seq_len, skip_bad)
        train, held_out = _split(examples, self.shards.manifest.split.val_fraction, seed)
        padding = padding_id(tokenizer)

        def packed(chosen: list[int], augment: int | None) -> PicturePacked:
            return PicturePacked(
                [examples[i] for i in chosen], [pictures[i] for i in chosen], seq_len, padding,
                config, augment,
            )  # fmt: skip

        text = text_windows(folder, self.shards, seq_len, document_mask)
        self.val_parts: dict[str, Sequences] = {"text": text[1], "pictures": packed(held_out, None)}
        kinds: list[Sequences] = [text[0], packed(train, seed if augment else None)]
        used = [(kind, weight) for kind, weight in zip(kinds, mix) if weight]
        mixture = Mixture([kind for kind, _ in used], [weight for _, weight in used], seed)
        val = cast(Sequences, ConcatDataset(cast(Any, list(self.val_parts.values()))))
        super().__init__(mixture, val, seed=seed, **how)


def _split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the examples to train on and to hold out, at least one each."""

    def place(number: int) -> bytes:
        text = examples[number].ids[examples[number].counted]
        return hashlib.sha256(f"{seed}:".encode() + text.tobytes()).digest()

    if len(examples) < 2:
        raise DataError("at least 2 pictures with texts are needed, one of them to hold out")
    order = sorted(range(len(examples)), key=place)
    count = min(max(1, round(share * len(order))), len(order) - 1)
    while count + 1 < len(order) and place(order[count]) == place(order[count - 1]):
        count += 1  # equal texts stay together
    return sorted(order[count:]), sorted(order[:count])
