"""Words for people."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with its noun: '1 token', '2,000 tokens'. plural: where it takes more than an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
