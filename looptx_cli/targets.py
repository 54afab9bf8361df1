"""Files that a model draws or speaks into."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from looptx_core.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image


def check_target(
    flag: str,
    file: Path,
    kinds: Mapping[str, str],
    noun: str,
    is_of_kind: Callable[[Path, str], bool],
) -> None:
    """Raise `UsageError` where no item can be written to this file.

    A file that is there is replaced if it is of the same kind. kinds: by the file's ending.
    """
    kind = kinds.get(file.suffix.lower())
    try:
        file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, or a loop of links
        raise UsageError(f"{flag} {file}: {error.strerror}; choose another name") from error
    if file.is_dir():
        example = file / f"{noun}{next(iter(kinds))}"
        raise UsageError(f"{flag} {file}: a folder; give the name of a file, as {example}")
    if kind is None:
        raise UsageError(f"{flag} {file}: give a name that ends in {', '.join(kinds)}")
    if not file.parent.is_dir():
        raise UsageError(f"{flag} {file}: there is no folder {file.parent}; make it first")
    if os.path.lexists(file) and not is_of_kind(file, kind):
        raise UsageError(
            f"{flag} {file}: what is there is no {kind} {noun}, so it is not replaced; choose "
            "another name"
        )
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageError(f"{flag} {file}: may not be written to; choose another place")


def map_file(written: Path) -> Path:
    """Where the map of the loops of a written item goes."""
    return written.with_name(f"{written.stem}-iterations.png")


def grey(values: Sequence[float], columns: int, size: tuple[int, int]) -> Image:
    """Numbers from 0 to 1, row by row, as a grey picture of this width and height."""
    from PIL import Image

    found = Image.new("L", (columns, len(values) // columns))
    found.putdata([round(255 * value) for value in values])
    return found.convert("RGB").resize(size, Image.Resampling.NEAREST)


def save_beside(parts: Sequence[Image], file: Path, gap: int, below: bool = False) -> None:
    """Write pictures of one height beside each other, or of one width below each other, as a PNG.

    Raises `LooptxError` where it can't be written.
    """
    from PIL import Image

    from looptx_core.atomic import write_file
    from looptx_core.media.image.coded import to_file

    axis = int(below)
    length = sum(part.size[axis] for part in parts) + gap * (len(parts) - 1)
    size = (parts[0].width, length) if below else (length, parts[0].height)
    whole, place = Image.new("RGB", size, "white"), 0
    for part in parts:
        whole.paste(part, (0, place) if below else (place, 0))
        place += part.size[axis] + gap
    write_file(file, to_file(whole))
