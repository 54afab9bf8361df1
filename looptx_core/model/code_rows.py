"""Rows of the vocabulary that are codes, while they are trained.

The row of a code is the sum of a vector for each of its digits' levels, which all codes share, and
of a vector of its own: many codes are rare, and what is learned of a level serves all of them
(multi-one-hot latents, arXiv 2312.01203). `fold_code_rows` makes ordinary rows of both, so that a
saved model has one matrix, as every kernel expects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def share_code_rows(model: LoopedTransformer, learned: bool = False) -> None:
    """Let the rows of a model's codes share a part while they are trained.

    learned: the rows are kept, and what they share starts at 0; else the other way round.
    """
    draw = model.config.draw
    if not (draw.codes and draw.digits):
        return
    model.code_rows = CodeRows(draw.first_code, draw.levels, model.config.d_model)
    with torch.no_grad():
        if learned:
            model.code_rows.table.zero_()
        else:
            for rows in model.vocabulary():
                rows[draw.first_code : draw.first_code + draw.codes] = 0


def fold_code_rows(model: LoopedTransformer) -> None:
    """Make ordinary rows of what a model's codes share, for good."""
    if model.code_rows is not None:
        for rows in model.vocabulary():
            model.code_rows.add_to(rows.data)
        model.code_rows = None
