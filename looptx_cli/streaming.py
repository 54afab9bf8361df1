"""Text of a model as it comes, on stdout."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from looptx_cli.console import is_plain, note, shown, stdout
from looptx_cli.samples import or_sample
from looptx_core.errors import UsageError
from looptx_core.media.registry import MEDIA

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
    quiet: bool,
    before: str = "",
) -> Generation:
    """Print a continuation as it comes, and end its line.

    iterations: in the colours of the depths over their figures, with the legend; where there are
    no colours, a line with the figures for each token. before: what stands before it.
    """
    from looptx_cli.render import TokenDisplay, answers_told, legend, token_line

    plain = is_plain(sys.stdout)
    deepest = engine.model.config.max_loops
    out = stdout()
    display = TokenDisplay(out, deepest, before)

    begun = False

    def watch(step: Step) -> None:
        nonlocal begun
        if not begun and not (iterations and plain):
            print_now(shown(before))  # only now: refused settings print nothing
        begun = True
        if not iterations:
            print_now(shown(step.text))
        elif plain:
            print_now(token_line(step) + "\n")
        else:
            display.add(step)

    (result,) = engine.complete([prompt], options, watch)
    display.close()
    print_now("" if iterations else "\n")
    if iterations and not plain:
        out.print(legend(result, deepest))
    if iterations and (told := answers_told(before, result.text)):
        note(told, quiet) if plain else out.print(told)
    return result


def given_media(quiet: bool = False, **files: Iterable[Path] | None) -> dict[str, Sequence[Path]]:
    """The files of each medium that were given, or the samples that they name."""
    return {name: [or_sample(file, quiet) for file in some] for name, some in files.items() if some}


def read_items(
    engine: Engine, files: Mapping[str, Sequence[Path]], fps: float | None = None
) -> tuple[MediaItem, ...]:
    """The files of each medium, decoded.

    fps: where it is given, the clip `-` is a pipe of so many frames a second on standard input.
    """
    config = engine.model.config

    def read(name: str, file: Path) -> MediaItem:
        if fps and name == "video" and str(file) == "-":
            from looptx_core.media.video.read import read_pipe

            return read_pipe(piped_frames(), config, fps, "standard input")
        return MEDIA[name].read(file, config)

    return tuple(read(name, file) for name, some in files.items() for file in some)


def piped_frames() -> io.BufferedIOBase:
    """Standard input, as a pipe of frames. Raises `UsageError` where it is a terminal."""
    if sys.stdin.isatty():
        raise UsageError(
            "--video - reads frames from a pipe, such as ffmpeg -i in.mp4 -f image2pipe -c:v png -"
        )
    return cast(io.BufferedIOBase, sys.stdin.buffer)


PIPE_FPS = 25.0
"""Frames a second of a pipe, where nothing is said."""


def pipe_rate(clips: Sequence[Path], fps: float | None, every: float | None) -> float | None:
    """Frames a second of a pipe, None without one. Raises `UsageError` for flags of a pipe that
    are bad or have none."""
    piped = [str(clip) for clip in clips].count("-")
    for flag, value in (("--fps", fps), ("--every", every)):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{flag} {value:g}: above 0")
        if value is not None and not piped:
            raise UsageError(f"{flag} goes with --video -, a pipe of frames")
    if piped > 1 or (every and len(clips) > 1):
        raise UsageError("--video - goes once, as there is one standard input")
    return fps or PIPE_FPS if piped else None
