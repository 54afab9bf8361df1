"""What a model was trained on, where its run tells."""

from __future__ import annotations

from pathlib import Path

from looptx_core.config.resolve import recorded
from looptx_core.data.records import media_named


def own_data(folder: Path) -> tuple[str, ...] | None:
    """The inputs of the training run that made this model folder; () is the bundled text.

    None where nothing is known of it. A finetuning's examples are no data of the model: none of
    them would tell what was forgotten.
    """
    run = folder.parent / "config.yaml"
    if folder.name != "final" or not run.is_file() or not recorded(run, "preset"):
        return None
    return tuple(recorded(run, "data") or ())


def own_text(folder: Path) -> tuple[str, ...] | None:
    """`own_data` without records of media, which are no text to cut into sequences."""
    data = own_data(folder)
    return data and tuple(item for item in data if not media_named([item]))
