"""Pictures with texts, for training: read, made examples, held out, decoded when needed.

An input is a JSON-lines file of `{"image": path, "text": ...}` (or several paths in `image`, or
`{"parts": [{"image": path}, {"text": ...}, ...]}`), or a folder with X.png beside X.txt. Paths
are relative to the file. What counts is the text; pictures are given. A text may be a list of
texts that say the same: each epoch draws one of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from looptx_core.config.model import ModelConfig
from looptx_core.data.batches import Sequences, text_windows
from looptx_core.data.corpus import PICTURES, Corpus
from looptx_core.data.datamodule import Batches
from looptx_core.data.examples import Example, Packed, padding_id
from looptx_core.data.pictures import measure, read_picture
from looptx_core.data.shards import open_shards
from looptx_core.data.tokenizer import end_id
from looptx_core.errors import DataError, UsageError
from looptx_core.model.vision import together

VISION_LAYERS = 4
"""Blocks of the encoder that a model gets where pictures come and nothing else is said."""

Part = Path | tuple[str, ...]
"""A picture, or the texts to draw one of, in the order of a record."""


@dataclass
class Pairs:
    """What was read: each record's parts with where they stand, and how many were left out."""

    records: list[tuple[str, list[Part]]] = field(default_factory=list)
    skipped: int = 0

    def texts(self) -> Iterator[str]:
        """All text, for a tokenizer."""
        for _, parts in self.records:
            yield " ".join(text for part in parts if isinstance(part, tuple) for text in part)

    @property
    def fingerprint(self) -> str:
        """Of texts and of the pictures' names and sizes, wherever they lie."""
        digest = hashlib.sha256()
        for _, parts in self.records:
            for part in parts:
                known = (part.name, part.stat().st_size) if isinstance(part, Path) else part
                digest.update(json.dumps(known).encode())
        return digest.hexdigest()


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
        case {"image": str(image), "text": text}:
            listed = [{"image": image}, {"text": text}]
        case {"image": [*images], "text": text}:
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
                out.append((text.strip(),))
            case {"text": [*texts]} if _are_texts(texts):
                out.append(tuple(text.strip() for text in texts))
    if len({isinstance(part, Path) for part in out}) < 2:
        raise DataError(
            f'{where}: needs a picture and a text, as {{"image": path, "text": ...}}; mend it, '
            "or pass --skip-bad"
        )
    return out


@dataclass(frozen=True)
class PairExample:
    """A record as tokens. ways: with each of its texts, the longest first; pictures: its files."""

    ways: list[Example]
    pictures: list[Path]


def _are_texts(texts: list[Any]) -> bool:
    return bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)


def pair_examples(
    pairs: Pairs, tokenizer: Tokenizer, config: ModelConfig, seq_len: int, skip_bad: bool = False
) -> list[PairExample]:
    """Examples; the end token stands before and after a record.

    Raises `DataError` for a picture that can't be read and a record longer than `seq_len`;
    skip_bad: those are left out and counted in `pairs`.
    """
    examples = []
    for where, parts in pairs.records:
        try:
            example = _pair_example(where, parts, tokenizer, config)
            longest = len(example.ways[0].ids)
            if longest > seq_len + 1:
                raise DataError(
                    f"{where}: {longest} tokens with its pictures, over --seq-len {seq_len}; "
                    "raise --seq-len, or pass --skip-bad"
                )
        except DataError:
            if not skip_bad:
                raise
            pairs.skipped += 1
            continue
        examples.append(example)
    return examples


def _pair_example(
    where: str, parts: list[Part], tokenizer: Tokenizer, config: ModelConfig
) -> PairExample:
    """Text n of a list goes with text n of the record's other lists, which go round."""
    end = end_id(tokenizer)
    pictures = [part for part in parts if isinstance(part, Path)]
    sizes = [math.prod(measure(file, config, f"{where}: {file}")) for file in pictures]
    ways = []
    for way in range(max(len(part) for part in parts if isinstance(part, tuple))):
        ids, counted, size = [end], [False], iter(sizes)
        for part in parts:
            if isinstance(part, Path):
                new, text = [config.image_token] * next(size), False
            else:
                chosen = part[way % len(part)]
                new, text = tokenizer.encode(chosen, add_special_tokens=False).ids, True
            ids += new
            counted += [text] * len(new)
        ways.append(Example(np.array([*ids, end], np.int32), np.array([*counted, True])))
    return PairExample(sorted(ways, key=lambda way: -len(way.ids)), pictures)


class PicturePacked(Packed):
    """`Packed` for examples with pictures, which are decoded here, in the loader's workers.

    draw: a seed to draw each example's text, in each epoch; absent: its longest. augment: draw
    each picture anew too.
    """

    def __init__(
        self,
        pairs: Sequence[PairExample],
        seq_len: int,
        padding: int,
        config: ModelConfig,
        draw: int | None = None,
        augment: bool = False,
    ) -> None:
        super().__init__([pair.ways[0] for pair in pairs], seq_len, padding)
        self.pairs, self.config, self.draw, self.augment = pairs, config, draw, augment

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """As `Packed`'s, with patches and grids as in `Pictures`."""
        epoch, place = divmod(index, len(self))
        texts, found = [], []
        for number in self.rows[place]:
            pair, way, draw = self.pairs[number], 0, None
            if self.draw is not None:
                draw = np.random.default_rng((self.draw, epoch, number))
                way = int(draw.integers(len(pair.ways))) if len(pair.ways) > 1 else 0
            texts.append((number, pair.ways[way]))
            how = draw if self.augment else None
            found += [read_picture(path, self.config, augment=how) for path in pair.pictures]
        item = self.sequence(place, texts)
        if pictures := together(found):
            item |= {"patches": pictures.patches, "grids": pictures.grids}
        return item


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
        examples = pair_examples(pairs, tokenizer, config, seq_len, skip_bad)
        train, held_out = _split(examples, self.shards.manifest.split.val_fraction, seed)
        how_packed = (seq_len, padding_id(tokenizer), config)
        text = text_windows(folder, self.shards, seq_len, document_mask)
        self.val_parts: dict[str, Sequences] = {
            "text": text[1],
            "pictures": PicturePacked(held_out, *how_packed),
        }
        kinds: list[Sequences] = [text[0], PicturePacked(train, *how_packed, seed, augment)]
        used = [(kind, weight) for kind, weight in zip(kinds, mix) if weight]
        mixture = Mixture([kind for kind, _ in used], [weight for _, weight in used], seed)
        val = cast(Sequences, ConcatDataset(cast(Any, list(self.val_parts.values()))))
        super().__init__(mixture, val, seed=seed, **how)


def _split(
    examples: Sequence[PairExample], share: float, seed: int
) -> tuple[list[PairExample], list[PairExample]]:
    """What to train on and to hold out, at least one each; records of equal texts together."""

    def place(example: PairExample) -> bytes:
        texts = [way.ids[way.counted].tobytes() for way in example.ways]
        return hashlib.sha256(f"{seed}:".encode() + b"".join(texts)).digest()

    if len(examples) < 2:
        raise DataError("at least 2 pictures with texts are needed, one of them to hold out")
    order = sorted(range(len(examples)), key=lambda i: place(examples[i]))
    count = min(max(1, round(share * len(order))), len(order) - 1)
    while count + 1 < len(order) and place(examples[order[count]]) == place(
        examples[order[count - 1]]
    ):
        count += 1  # equal texts stay together
    return [examples[i] for i in sorted(order[count:])], [
        examples[i] for i in sorted(order[:count])
    ]
