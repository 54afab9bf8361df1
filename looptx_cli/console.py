"""The two streams: results on stdout, everything else on stderr; plain text where it must be."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
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
    """One line on stderr, with parameters as flags, unless --quiet."""
    if not quiet:
        stderr().print(with_flags(message), soft_wrap=True)


def show_reasons() -> None:
    """From here on, write to stderr what the library notes on its choices."""
    log = logging.getLogger("looptx_core")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(_ToStderr())


class _ToStderr(logging.Handler):
    """A line for each record, on the stderr of its moment."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


_flags: dict[str, str] = {}  # of the running command, by the parameter that each sets


def know_flags(flags: Mapping[str, str]) -> None:
    """From here on `with_flags` spells these parameters, and no others, as these flags."""
    _flags.clear()
    _flags.update(flags)


def flags_of(names: Iterable[str]) -> dict[str, str]:
    """The flags that Typer makes of parameters, by the parameters' names."""
    return {name: "--" + name.replace("_", "-") for name in names}


def with_flags(text: str, flags: Mapping[str, str] = _flags) -> str:
    """A text of the library for the command line.

    The library names a parameter in backticks, as in `` `max_new_tokens` ``. Where that is an
    option of the command that runs, its flag takes the place: --max-new-tokens. All else stays.

    flags: by parameter; absent: of the command that runs.
    """
    return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), text)


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
