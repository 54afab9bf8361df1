"""The two streams: results on stdout, everything else on stderr; plain text where it must be."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from looptx_core.documents import printable


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
        stderr().print(message, soft_wrap=True)


def shown(text: str) -> str:
    """Text of a model for stdout: a terminal gets no control characters, a file gets all."""
    return printable(text, keep="\n\t") if sys.stdout.isatty() else text


class _Console(Console):
    """Prints texts as they are, in tables too: no markup, no emoji codes, nothing that steers."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text, keep="\n\t"), **how)


def _console(stream: TextIO) -> Console:
    how: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    # Rich's own NO_COLOR keeps bold and its FORCE_COLOR writes codes into pipes: decide here.
    if is_plain(stream):
        how |= {"force_terminal": False, "color_system": None}
    return _Console(file=stream, **how)
