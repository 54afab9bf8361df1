"""How far a long prompt has been read: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from looptx_cli.console import note, stderr

if TYPE_CHECKING:
    from looptx_core.generation.engine import Engine

_LONG = 4096  # tokens; shorter prompts are read without a word
_LINE_EVERY = 10.0  # seconds between plain lines


@contextmanager
def reading_shown(engine: Engine, tokens: int, quiet: bool) -> Iterator[None]:
    """Within, show how the engine reads a prompt of so many tokens, if it is long."""
    if quiet or tokens < _LONG:
        yield
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    live = stderr().is_terminal
    bar = Progress(
        TextColumn("reading"), BarColumn(12), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), console=stderr(), transient=True, disable=not live,
    )  # fmt: skip
    task = bar.add_task("", total=tokens, rate="")
    read, begun, last = 0, time.monotonic(), time.monotonic()

    def show(count: int) -> None:
        nonlocal read, last
        read += count
        now = time.monotonic()
        rate = f"{read / max(now - begun, 1e-9):,.0f} tokens/s"
        bar.update(task, completed=read, rate=rate)
        if not live and now - last >= _LINE_EVERY and read < tokens:
            note(f"read {read:,} of {tokens:,} tokens, {rate}")
            last = now
        if read >= tokens:
            bar.stop()
            note(f"read {tokens:,} tokens in {now - begun:,.1f} s, {rate}")

    engine.on_prompt = show
    bar.start()
    try:
        yield
    finally:
        bar.stop()
        engine.on_prompt = None
