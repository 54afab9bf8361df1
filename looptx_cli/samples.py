"""Files that ship with looptx, by the names under which its documentation gives them."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from looptx_cli.console import note

FOLDER = Path(str(importlib.resources.files("looptx_core").joinpath("assets", "samples")))


def or_sample(file: Path, quiet: bool = False) -> Path:
    """A file that was named, or the sample of that name where there is no such file."""
    sample = FOLDER / file.name
    if file.exists() or not sample.is_file():
        return file
    note(f"{file}: no such file; this is the sample that looptx ships, {sample}", quiet)
    return sample
