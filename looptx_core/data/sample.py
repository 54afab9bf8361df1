"""A few rows of text on which any model can be looked at."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor

from looptx_core.data.corpus import bundled_text

_CHARACTERS = 4_000
_ROWS, _LENGTH = 4, 128


def sample_text(tokenizer: Tokenizer, length: int) -> Tensor:
    """Tokens of the bundled text, (rows, length)."""
    text = bundled_text().read_text("utf-8")
    start = len(text) // 2  # past the front matter
    ids = tokenizer.encode(text[start : start + _CHARACTERS], add_special_tokens=False).ids
    length = min(_LENGTH, length)
    rows = min(_ROWS, len(ids) // length)
    return torch.tensor(ids[: max(1, rows) * length]).view(max(1, rows), -1)
