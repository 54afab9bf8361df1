"""Text of a model as it comes, on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from looptx_cli.console import is_plain, stdout
from looptx_core.media import MEDIA

if TYPE_CHECKING:
    from looptx_core.config.generation import GenerationOptions
    from looptx_core.generation.engine import Engine, Generation, Prompt, Step
    from looptx_core.media.batch import MediaItem


def print_now(text: str) -> None:
    """Text to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def stream(
    engine: Engine,
    prompt: Prompt,
    options: GenerationOptions,
    iterations: bool,
    before: Callable[[], str] = lambda: "",
) -> Generation:
    """Print a continuation as it comes, and end its line.

    iterations: in the colours of the depths, with the legend; where there are no colours, a line
    with the figures for each token. before: what stands before it, asked for once it begins.
    """
    from looptx_cli.render import legend, token_line, token_text

    plain = is_plain(sys.stdout)
    deepest = engine.model.config.max_loops
    out = stdout()
    begun = False

    def watch(step: Step) -> None:
        nonlocal begun
        if not begun and not (iterations and plain):
            print_now(before())  # only now: refused settings print nothing
        begun = True
        if not iterations:
            print_now(step.text)
        elif plain:
            print_now(token_line(step) + "\n")
        else:
            out.print(token_text(step, deepest), end="")

    (result,) = engine.complete([prompt], options, watch)
    print_now("" if iterations and plain else "\n")
    if iterations and not plain:
        out.print(legend(result, deepest))
    return result


def read_items(engine: Engine, files: Mapping[str, Sequence[Path]]) -> tuple[MediaItem, ...]:
    """The files of each medium, decoded."""
    config = engine.model.config
    return tuple(MEDIA[name].read(file, config) for name, some in files.items() for file in some)
