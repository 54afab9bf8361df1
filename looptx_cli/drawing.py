"""Pictures that a model draws: their files, and what a terminal shows of them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looptx_cli.console import is_plain, note, stdout
from looptx_cli.streaming import print_now
from looptx_cli.targets import check_target, grey, map_file, save_beside
from looptx_core.errors import LooptxError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from looptx_core.config.generation import GenerationOptions
    from looptx_core.generation.engine import Engine, Generation
    from looptx_core.generation.outputs import Output
    from looptx_core.media.batch import MediaItem

SCHEMA_VERSION = 1
"""Of the documents of `looptx generate`."""
KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
"""What is drawn to, by the file's ending, as Pillow names it."""
_CELL = 24  # pixels of a code in the map of loops and confidence


def check_picture_target(file: Path, flag: str = "--draw") -> None:
    """Raise `UsageError` where no picture can be written to this file."""
    check_target(flag, file, KINDS, "picture", _is_picture)


def _is_picture(file: Path, kind: str) -> bool:
    from PIL import Image

    try:
        with Image.open(file, formats=[kind]):
            return True
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


def draw_picture(
    engine: Engine,
    text: str,
    items: tuple[MediaItem, ...],
    options: GenerationOptions,
    file: Path,
    iterations: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Draw a text into a file."""
    from looptx_core.generation.engine import MediaPrompt

    prompt = MediaPrompt(text, items, write="image")
    length = check_room(engine, engine.length(prompt), options)
    (result,) = engine.complete([prompt], replace(options, max_new_tokens=length))
    picture, media = drawn(result, file)
    config = engine.model.config
    if iterations:
        place = write_map(media, picture, config.draw.columns, config.max_loops)
        note(f"loops and confidence: {place}", quiet)
    if as_json:
        print_document(result, media)
        return
    show_picture(picture, file)
    if iterations:
        print_now("\n".join(map_lines(media, config.draw.columns)) + "\n")
    note(
        f"{length} codes, {result.mean_loops:.2f} loops a code of {config.max_loops}, drawn in "
        f"{result.tokens[-1].seconds:.2f} s, {options.draw_steps} steps of diffusion in "
        f"{media['elapsed']:.2f} s",
        quiet,
    )
    if not iterations:
        guided = "" if options.guidance != 1 else "--guidance 2, "
        note(f"try next: --show-iterations, {guided}or another --seed", quiet)


def print_document(result: Generation, media: dict[str, Any]) -> None:
    """Print what was written, and its item, as one JSON document."""
    document = {**result.to_dict(), "media": [media]}
    print_now(json.dumps({"schema_version": SCHEMA_VERSION, **document}) + "\n")


def check_room(engine: Engine, prompt_tokens: int, options: GenerationOptions) -> int:
    """The codes of a picture. Raises `UsageError` where they find no room."""
    config = engine.model.config
    length, holds = config.draw.rows * config.draw.columns, config.context_limit
    if holds is not None and prompt_tokens + length > holds:
        raise UsageError(
            f"the prompt has {prompt_tokens:,} tokens, a picture takes {length}, and the model's "
            f"context holds {holds:,}; shorten the prompt"
        )
    if options.max_new_tokens < length:
        raise UsageError(
            f"`max_new_tokens` {options.max_new_tokens}: a picture takes {length}; raise it"
        )
    return length


def write_picture(output: Output, file: Path) -> Image:
    """Write a drawn picture to a file of the kind that its ending says, and return it.

    Raises `LooptxError` where it can't be written.
    """
    from PIL import Image

    from looptx_core.atomic import write_file
    from looptx_core.media.image.coded import to_file

    picture = Image.open(io.BytesIO(output.content))
    write_file(file, to_file(picture, KINDS[file.suffix.lower()]))
    return picture


def write_map(media: dict[str, Any], picture: Image, columns: int, deepest: int) -> Path:
    """Draw the loops and the confidence of each code beside the picture, into a file of its own.

    Returns its place: beside the picture, with `-iterations` in its name.
    """
    from PIL import Image

    rows = len(media["codes"]) // columns
    size = (columns * _CELL, rows * _CELL)
    parts = [picture.convert("RGB").resize(size, Image.Resampling.NEAREST)]
    for values in ([loops / deepest for loops in media["loops"]], media["confidence"]):
        parts.append(grey(values, columns, size))
    target = map_file(Path(media["file"]))
    save_beside(parts, target, _CELL)
    return target


def map_lines(media: dict[str, Any], columns: int) -> list[str]:
    """The loops of each code, and how sure the model was of it in percent, as rows of numbers."""
    lines = ["loops" + " " * (3 * columns - 2) + "sure %"]
    for start in range(0, len(media["codes"]), columns):
        row = slice(start, start + columns)
        loops = "".join(f"{loops:>3}" for loops in media["loops"][row])
        sure = "".join(f"{100 * share:>4.0f}" for share in media["confidence"][row])
        lines.append(f"{loops}   {sure}")
    return lines


def show_picture(picture: Image, file: Path) -> None:
    """A picture on a terminal, two pixels a character; elsewhere the file's name."""
    import sys

    out = stdout()
    if is_plain(sys.stdout) or out.width < picture.width:
        out.print(str(file), soft_wrap=True)
        return
    from rich.text import Text

    pixels = picture.convert("RGB")
    for row in range(0, pixels.height, 2):
        line = Text()
        for column in range(pixels.width):
            upper = pixels.getpixel((column, row))
            lower = pixels.getpixel((column, min(row + 1, pixels.height - 1)))
            line.append("\u2580", style=f"{_colour(upper)} on {_colour(lower)}")
        out.print(line)
    out.print(str(file), soft_wrap=True)


def _colour(pixel: Any) -> str:
    return "rgb({},{},{})".format(*pixel)


def drawn(result: Generation, file: Path) -> tuple[Image, dict[str, Any]]:
    """The picture of a result, written to a file, and what `--json` says of it."""
    if not result.outputs:
        raise LooptxError("the picture was not finished; report it")
    picture = write_picture(result.outputs[0], file)
    return picture, {**result.media[0], "file": str(file)}
