"""Words for people."""

from __future__ import annotations

import shlex
from os import PathLike


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with its noun: '1 token', '2,000 tokens'. plural: where it takes more than an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def quoted(word: str | PathLike[str]) -> str:
    """A path or another word in a command line that is printed, as a shell takes it."""
    return shlex.quote(str(word))
