"""Whether a folder that looptx wrote is whole: a run, a model, an adapter or tokenised data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from looptx_core.checkpoint.run_facts import FILE as RUN_FACTS
from looptx_core.errors import LooptxError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Part:
    """A part of a folder. undigested: it can be read, and has no digest to compare it with."""

    path: str
    state: Literal["ok", "undigested", "damaged"]
    detail: str = ""


@dataclass
class FolderCheck:
    """What was looked at in a folder."""

    path: str
    kind: Literal["run", "model", "adapter", "tokenised data"]
    parts: list[Part] = field(default_factory=list)

    @property
    def damaged(self) -> list[Part]:
        return [part for part in self.parts if part.state == "damaged"]

    def to_dict(self) -> dict[str, Any]:
        """The document that `looptx doctor --path FOLDER --json` prints."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "damaged": len(self.damaged)}

    def check(self, path: Path, read: Callable[[], bool]) -> None:
        """Note a part. read: whether it has digests; raises what is wrong with it."""
        try:
            self.parts.append(Part(str(path), "ok" if read() else "undigested"))
        except (LooptxError, OSError) as error:
            self.parts.append(Part(str(path), "damaged", " ".join(str(error).split())))


def examine_folder(folder: Path) -> FolderCheck | None:
    """Read all of a folder that looptx wrote; None for any other."""
    if (folder / "config.yaml").is_file() or (folder / RUN_FACTS).is_file():
        return _run(folder)
    if (folder / "adapter_config.json").is_file():
        found = FolderCheck(str(folder), "adapter")
        found.check(folder, lambda: _adapter(folder))
    elif (folder / "config.json").is_file():
        found = FolderCheck(str(folder), "model")
        found.check(folder, lambda: _model(folder))
    elif (folder / "manifest.json").is_file():
        found = FolderCheck(str(folder), "tokenised data")
        found.check(folder, lambda: _shards(folder))
    else:
        return None
    return found


def _run(folder: Path) -> FolderCheck:
    from looptx_core.checkpoint.run_summary import read_run
    from looptx_core.training.callbacks import verify_checkpoint

    found = FolderCheck(str(folder), "run")

    def settings() -> bool:
        read_run(folder)
        return True

    found.check(folder, settings)
    for checkpoint in sorted(folder.glob("checkpoints/step-*.ckpt")):
        found.check(checkpoint, partial(verify_checkpoint, checkpoint))
    final = folder / "final"
    if (final / "adapter_config.json").is_file():
        found.check(final, lambda: _adapter(final))
    elif final.is_dir():
        found.check(final, lambda: _model(final))
    return found


def _model(folder: Path) -> bool:
    from looptx_core.checkpoint.folder import load_model
    from looptx_core.machine.integrity import has_digests

    load_model(folder)
    return has_digests(folder)


def _adapter(folder: Path) -> bool:
    from looptx_core.finetuning.adapters import check_adapter
    from looptx_core.machine.integrity import has_digests

    check_adapter(folder)
    return has_digests(folder)


def _shards(folder: Path) -> bool:
    from looptx_core.data.shards import open_shards

    open_shards(folder, verify=True)
    return True
