"""Which folder a command works with: the model that is meant, and a free place for a new run."""

from __future__ import annotations

import importlib.resources
import json
import re
from dataclasses import dataclass
from pathlib import Path

from looptx_core.errors import DataError, UsageError

RUNS = Path("runs")
_VISION_KEYS = ("vision", "vision_config")


@dataclass(frozen=True)
class ResolvedModel:
    """A model folder, and in a few words why it was chosen."""

    folder: Path
    reason: str


def resolve_model(
    path: str | Path | None, runs: Path = RUNS, need: frozenset[str] = frozenset()
) -> ResolvedModel:
    """The model folder that is meant.

    Args:
        path: a run or a model folder; None: the newest finished run that can do what is asked,
            else the bundled model.
        need: what the model must be able to do; 'vision' is the one known need.
    Raises:
        DataError: no such folder, or one that is neither, is not finished or can't do it.
    """
    if path is not None:
        found = _given(Path(path))
        if lacking := need - abilities(found.folder):
            raise DataError(f"{path}: this model has no {', '.join(sorted(lacking))}; use another")
        return found
    finished = [run for run in _runs(runs) if need <= abilities(run / "final")]
    if finished:
        newest = max(finished, key=lambda run: (run / "final" / "config.json").stat().st_mtime_ns)
        return ResolvedModel(newest / "final", f"newest finished run under {runs}")
    bundled = Path(str(importlib.resources.files("looptx_core"))) / "assets" / "model"
    if _is_model(bundled) and need <= abilities(bundled):
        return ResolvedModel(bundled, f"bundled model, no finished run under {runs}")
    wanted = f" with {', '.join(sorted(need))}" if need else ""
    raise DataError(f"no model{wanted} under {runs}; train one by looptx train, or give --model")


def next_run_dir(out: str | Path | None, command: str, overwrite: bool, runs: Path = RUNS) -> Path:
    """The folder for a new run: `out`, or the next free `runs/<command>-<n>`. Makes nothing.

    Raises:
        UsageError: `out` is a file, or it holds something and may not be overwritten.
    """
    if out is None:
        taken = [re.fullmatch(rf"{re.escape(command)}-(\d+)", p.name) for p in _listing(runs)]
        return runs / f"{command}-{1 + max((int(m[1]) for m in taken if m), default=0)}"
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; choose another --out")
    if _listing(out) and not overwrite:
        raise UsageError(f"{out} exists; pass --overwrite or choose another --out")
    return out


def abilities(folder: Path) -> frozenset[str]:
    """What a model folder can do beyond text. An unreadable one can do nothing."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        return frozenset({"vision"} if any(config.get(key) for key in _VISION_KEYS) else ())
    except (OSError, ValueError, AttributeError):
        return frozenset()


def _given(path: Path) -> ResolvedModel:
    if path.is_file():
        from looptx_core.checkpoint.folder import refuse_pickle  # brings torch

        refuse_pickle(path)
        raise DataError(f"{path}: a file; give the folder of a run or of a model")
    if not path.exists():
        raise DataError(f"{path}: no such run or model folder; check --model")
    if _is_model(path):
        return ResolvedModel(path, "given")
    if _is_model(path / "final"):
        return ResolvedModel(path / "final", "given run")
    if (path / "config.yaml").is_file():
        raise DataError(f"{path}: this run is not finished; resume it by looptx train --resume")
    raise DataError(f"{path}: neither a run nor a model folder; check --model")


def _runs(runs: Path) -> list[Path]:
    """Finished runs."""
    return [p for p in _listing(runs) if (p / "config.yaml").is_file() and _is_model(p / "final")]


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _listing(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
