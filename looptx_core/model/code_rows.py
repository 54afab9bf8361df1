"""Rows of the vocabulary that are codes, while they are trained.

The row of a code is the sum of a vector for each of its digits' levels, which all codes share, and
of a vector of its own: many codes are rare, and what is learned of a level serves all of them
(multi-one-hot latents, arXiv 2312.01203). `fold_code_rows` makes ordinary rows of both, so that a
saved model has one matrix, as every kernel expects.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looptx_core.media.codec.quantiser import digits_of, one_hot_digits

if TYPE_CHECKING:
    from looptx_core.model.loop import LoopedTransformer


class CodeRows(nn.Module):
    """The shared part of the rows from `first` on, of codes with these levels."""

    def __init__(self, first: int, levels: Sequence[int], width: int) -> None:
        super().__init__()
        self.first, self.levels = first, tuple(levels)
        self.codes = math.prod(self.levels)
        std = 0.02 / math.sqrt(len(self.levels))
        self.table = nn.Parameter(std * torch.randn(sum(self.levels), width))

    def embed(self, tokens: Tensor) -> Tensor:
        """What to add to the embeddings of tokens (...): (..., width), 0 where they are text."""
        number = tokens - self.first
        is_code = (number >= 0) & (number < self.codes)
        digits = digits_of(torch.where(is_code, number, 0), self.levels)
        starts = [sum(self.levels[:place]) for place in range(len(self.levels))]
        found = F.embedding(digits + torch.tensor(starts, device=digits.device), self.table)
        return found.sum(-2) * is_code[..., None]

    def logits(self, hidden: Tensor, vocab_size: int) -> Tensor:
        """What to add to the head's logits of hidden (..., width): (..., vocab_size)."""
        of_levels = hidden @ self.table.to(hidden.dtype).T
        own = of_levels @ one_hot_digits(self.levels).to(of_levels).T
        return F.pad(own, (self.first, vocab_size - self.first - self.codes))

    @torch.no_grad()
    def add_to(self, rows: Tensor) -> None:
        """Add the shared part to a matrix (vocab_size, width)."""
        shared = one_hot_digits(self.levels).to(self.table) @ self.table
        rows[self.first : self.first + self.codes] += shared.to(rows)


class AllCodeRows(nn.ModuleList):
    """`CodeRows` of each medium that a model writes."""

    @property
    def each(self) -> list[CodeRows]:
        return [rows for rows in self if isinstance(rows, CodeRows)]

    def embed(self, tokens: Tensor) -> Tensor:
        """What to add to the embeddings of tokens (...): (..., width)."""
        return sum(
            (rows.embed(tokens) for rows in self.each), torch.zeros((), device=tokens.device)
        )

    def logits(self, hidden: Tensor, vocab_size: int) -> Tensor:
        """What to add to the head's logits of hidden (..., width): (..., vocab_size)."""
        first, *others = (rows.logits(hidden, vocab_size) for rows in self.each)
        return sum(others, first)


def share_code_rows(model: LoopedTransformer, learned: Collection[str] = ()) -> None:
    """Let the rows of a model's codes share a part while they are trained.

    learned: the fingerprints of codecs whose rows are kept, and what they share starts at 0; of
    others it is the other way round.
    """
    config = model.config
    shared = [section for section in config.written if section.digits]
    if not shared:
        return
    model.code_rows = AllCodeRows(
        CodeRows(section.first_code, section.levels, config.d_model) for section in shared
    )
    with torch.no_grad():
        for section, own in zip(shared, model.code_rows.each):
            if section.codec in learned:
                own.table.zero_()
                continue
            for rows in model.vocabulary():
                rows[section.first_code : section.ids.stop] = 0


def fold_code_rows(model: LoopedTransformer) -> None:
    """Make ordinary rows of what a model's codes share, for good."""
    if model.code_rows is not None:
        for rows in model.vocabulary():
            for own in model.code_rows.each:
                own.add_to(rows.data)
        model.code_rows = None
