"""What turning text into shards, and pictures or speech into codes, needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from looptx_core.config.ranges import check_ranges


@dataclass(frozen=True)
class TokenizeConfig:
    """Settings of `looptx tokenize`, after merging."""

    data: tuple[str, ...] = ()
    """Files, folders or globs, - for standard input, hf:NAME[@CONFIG][:SPLIT] for the package
    datasets; absent: the bundled text."""
    out: str | None = None
    """The folder of shards, or of a codec; absent: runs/tokenize-<n> or runs/codec-<n>."""
    vocab_size: int = 2048
    """Tokens of the vocabulary to learn, special ones included."""
    tokenizer: str | None = None
    """An existing tokenizer.json, or a folder with one, in place of a new vocabulary."""
    val_fraction: float = 0.05
    """Share of documents held out for validation."""
    text_key: str = "text"
    """The key or column of the text in JSON lines and Parquet."""
    seed: int = 0
    """Seed of the split, and of a codec's training."""
    codec: Literal["picture", "speech"] | None = None
    """Train a codec instead: what turns pictures or speech into codes, which a model can learn to
    write."""
    steps: int = 4000
    """Optimizer steps of a codec."""
    max_minutes: float | None = None
    """Stop a codec's training after so many minutes."""
    batch_size: int = 64
    """Pictures, or stretches of speech, a step of a codec."""
    lr: float = 1e-2
    """Peak learning rate of a codec."""

    def __post_init__(self) -> None:
        check_ranges(self)
