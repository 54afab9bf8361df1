"""The two streams: results on stdout, everything else on stderr; plain text where it must be."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from rich.console import Console


def is_plain(stream: TextIO) -> bool:
    """Whether a stream takes no escape codes: no terminal, or the user asked for none."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return True
    return not stream.isatty()


def stdout() -> Console:
    """For results."""
    return _console(sys.stdout)


def stderr() -> Console:
    """For progress, notes and warnings."""
    return _console(sys.stderr)


def note(message: str, quiet: bool = False) -> None:
    """One line on stderr, unless --quiet."""
    if not quiet:
        stderr().print(message, markup=False, highlight=False, soft_wrap=True)


def _console(stream: TextIO) -> Console:
    # What is printed names paths and texts of others, in which brackets and colons are no markup.
    plain: dict[str, Any] = {"file": stream, "highlight": False, "markup": False, "emoji": False}
    # Rich's own NO_COLOR keeps bold and its FORCE_COLOR writes codes into pipes: decide here.
    if is_plain(stream):
        return Console(force_terminal=False, color_system=None, **plain)
    return Console(**plain)
