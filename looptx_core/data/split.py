"""What is held out: documents of a corpus by their numbers, examples by what they say.

Both are fixed by the seed. A corpus is streamed, so that its documents go by number; examples are
in memory, and equal ones are kept on one side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from looptx_core.data.corpus import Corpus, Document, boundary
from looptx_core.data.shards import Split
from looptx_core.errors import DataError

_FEW = 100  # documents; below it the split weighs bytes

# Called with what is done ('read' or 'encode'), the bytes so far, and all bytes where known.
Progress = Callable[[str, int, int | None], None]


def hold_out(
    keys: Sequence[bytes], share: float, seed: int, whole: bool = True
) -> tuple[list[int], list[int]]:
    """The numbers of examples to train on and to hold out, at least one each, in hash order.

    keys: what each example says. whole: hold out all examples of an equal key, beyond the share
    if need be, as far as one example is left to train on; else one key may be on both sides.
    Mixing keeps equal texts together, so that no caption is both learnt and judged. Finetuning
    does so for named groups only: its data may be a few examples repeated many times, and holding
    out every copy would leave nothing of some of them to learn.
    """
    hashes = [hashlib.sha256(f"{seed}:".encode() + key).digest() for key in keys]
    order = sorted(range(len(keys)), key=hashes.__getitem__)
    count = min(max(1, round(share * len(order))), len(order) - 1)
    while whole and count + 1 < len(order) and hashes[order[count]] == hashes[order[count - 1]]:
        count += 1
    return order[count:], order[:count]


class Census:
    """A first reading of the corpus: it checks every byte and counts."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.documents = 0
        self.bytes = 0
        self.chars = 0
        self.sizes: list[int] = []  # bytes, of the first _FEW documents
        self.lowest = (2.0, 0)  # the hash and number of the document first in hash order
        self.highest = (-1.0, 0)

    def count(self, corpus: Corpus, progress: Progress) -> Iterator[str]:
        """Pass the pieces on.

        Raises:
            DataError: no text, or too little to split.
        """
        for number, document in enumerate(corpus.documents()):
            before = self.bytes
            for piece in document.pieces:
                self.bytes += len(piece.encode())
                self.chars += len(piece)
                progress("read", self.bytes, None)
                yield piece
            self.documents += 1
            if number < _FEW:
                self.sizes.append(self.bytes - before)
            place = (_position(self.seed, number), number)
            self.lowest = min(self.lowest, place)
            self.highest = max(self.highest, place)
        if self.chars < 2:  # one character cannot be split
            names = ", ".join(source.name for source in corpus.sources[:3])
            raise DataError(f"{names}: empty; give files that hold some text")


def _position(seed: int, number: int) -> float:
    """A document's place in [0, 1), fixed by seed and number."""
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def held_out_by_hash(seed: int, number: int, share: float) -> bool:
    """Whether a corpus of many documents holds this one out."""
    return _position(seed, number) < share


class Splitter:
    """Gives each document, or the tail of the only one, to a split."""

    def __init__(self, census: Census, val_fraction: float) -> None:
        self._census = census
        self._fraction = val_fraction
        self._few: set[int] = set()
        self._tail_at = 0  # bytes
        if census.documents == 1:
            rule, text = "tail", "one document: its tail is held out, cut before a whitespace"
            at = round(census.bytes * (1 - val_fraction))
            self._tail_at = min(max(at, 1), census.bytes - 1)
        elif census.documents < _FEW:
            rule, text = "few", "whole documents in hash order until the share of bytes is reached"
            self._few = self._hold_out_few()
        else:
            rule, text = "hash", "a document is held out if its hash in [0, 1) is below the share"
        self.documents = census.documents
        self.facts = Split(rule, text, val_fraction, census.seed)

    def assign(self, documents: Iterable[Document]) -> Iterator[tuple[str, str | None]]:
        """Yield (split, piece), and (split, None) where a document ends."""
        for number, document in enumerate(documents):
            if self._tail_at:
                split = "val"
                yield from self._cut_tail(document)
            else:
                split = "val" if self._held_out(number) else "train"
                for piece in document.pieces:
                    yield split, piece
            yield split, None

    def _held_out(self, number: int) -> bool:
        if self._few:
            return number in self._few
        # At least one document on each side.
        if number in (self._census.lowest[1], self._census.highest[1]):
            return number == self._census.lowest[1]
        return held_out_by_hash(self._census.seed, number, self._fraction)

    def _hold_out_few(self) -> set[int]:
        sizes = self._census.sizes
        wanted = self._fraction * sum(sizes)
        chosen: set[int] = set()
        held = 0
        for number in sorted(range(len(sizes)), key=lambda n: _position(self._census.seed, n)):
            if held >= wanted or len(chosen) + 1 == len(sizes):
                break
            if held + sizes[number] <= 2 * wanted:  # else too little would be left to train on
                chosen.add(number)
                held += sizes[number]
        return chosen or {sizes.index(min(sizes))}

    def _cut_tail(self, document: Document) -> Iterator[tuple[str, str | None]]:
        seen = 0
        for piece in document.pieces:
            raw = piece.encode()
            if seen <= self._tail_at < seen + len(raw):
                limit = len(raw[: self._tail_at - seen].decode(errors="ignore"))
                # Without the max, a first character of several bytes would leave no head.
                head = boundary(piece, 0, max(limit, 1)) if limit or not seen else 0
                if head:
                    yield "train", piece[:head]
                yield "train", None
                yield "val", piece[head:]
            else:
                yield ("train" if seen < self._tail_at else "val"), piece
            seen += len(raw)
