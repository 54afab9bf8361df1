"""Which folder a command works with: the model that is meant, and a free place for a new run."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from looptx_core.checkpoint.header import read_header
from looptx_core.checkpoint.run_facts import run_command
from looptx_core.documents import check_links, read_json
from looptx_core.errors import DataError, LooptxError, UsageError
from looptx_core.media.registry import MEDIA
from looptx_core.outputs import check_output
from looptx_core.words import quoted

RUNS = Path("runs")


@dataclass(frozen=True)
class ResolvedModel:
    """A model folder, and in a few words why it was chosen."""

    folder: Path
    reason: str
    adapter: Path | None = None
    """An adapter's folder; `folder` is its base then."""


def resolve_model(
    path: str | Path | None,
    runs: Path = RUNS,
    need: frozenset[str] = frozenset(),
    check: Callable[[Path], object] = lambda folder: None,
) -> ResolvedModel:
    """The model folder that is meant.

    Args:
        path: a run, a model folder, or hf:OWNER/NAME for one on the hub; None:
            the newest finished run that can do what is asked,
            else the bundled model.
        need: what the model must be able to do: a medium's `ability`, or have 'weights' of its
            own, which an adapter has not.
        check: called with the folder of a run; one for which it raises `DataError` or `UsageError`
            is left out, with this reason. A model that is given is not checked.
    Raises:
        DataError: no such folder, or one that is neither, is not finished or can't do it.
        LooptxError: the hub can't be reached.
    """
    if path is not None:
        found = _given(local_folder(path))
        if "weights" in need and found.adapter:
            raise DataError(
                f"{path}: an adapter, which has no weights of its own; merge it first by "
                f"looptx convert --adapter {quoted(path)} --merge-adapter"
            )
        if need and (lacking := need - abilities(found.folder)):
            raise DataError(f"{path}: this model has no {', '.join(sorted(lacking))}; use another")
        return found
    skipped: list[str] = []
    for run in _runs(runs):
        try:
            if need <= abilities(run / "final"):
                check(run / "final")
                return _resolved(run / "final", f"newest finished run under {runs}{_but(skipped)}")
        except (DataError, UsageError) as error:  # one damaged run must not hide the others
            skipped.append(str(error))
    for bundled in bundled_models():
        if _is_model(bundled) and need <= abilities(bundled):
            why = f"bundled model, no finished run under {runs}{_but(skipped)}"
            return ResolvedModel(bundled, why)
    wanted = f" with {', '.join(sorted(need))}" if need else ""
    raise DataError(f"no model{wanted} under {runs}; train one by looptx train, or give `model`")


def resolve_adapter(path: str | Path, model: str | Path | None = None) -> ResolvedModel:
    """The adapter at `path`, a folder or a run, and its base: `model`, or the one it names.

    Raises:
        DataError: no adapter there, or no base.
    """
    path = local_folder(path)
    folder = next((f for f in (path, path / "final") if _is_adapter(f)), None)
    if folder is None:
        raise DataError(f"{path}: no adapter or run that made one; check `adapter`")
    if model is None:
        return _resolved(folder, "given")
    base = resolve_model(model, need=frozenset({"weights"}))
    return ResolvedModel(base.folder, base.reason, folder)


def local_folder(path: str | Path) -> Path:
    """The folder that is meant; one on the hub, hf:OWNER/NAME, is downloaded."""
    if not str(path).startswith("hf:"):
        return Path(path)
    from looptx_core.checkpoint.hub import download_model

    return download_model(path)


def bundled_model(name: str = "model") -> Path:
    """A model that ships with the package; `model` is the one of text."""
    return Path(str(importlib.resources.files("looptx_core"))) / "assets" / name


def bundled_models() -> list[Path]:
    """The models that ship with the package, the one of text first, then by how much they can do.

    Of those that can do something the first does little else, and so knows it best.
    """
    others = bundled_model().parent.glob("*-model")
    return [bundled_model(), *sorted(others, key=lambda folder: (len(abilities(folder)), folder))]


def next_run_dir(
    out: str | Path | None,
    command: str,
    overwrite: bool,
    runs: Path = RUNS,
    inputs: Iterable[str | Path | None] = (),
    report: Callable[[str], object] = lambda line: None,
) -> Path:
    """The folder for what a command writes: `out`, or the next free `runs/<command>-<n>`. Makes
    nothing.

    inputs: what the command reads, which is never replaced. report: told what will be replaced.

    Raises:
        UsageError: `out` is a file, or it holds something that may not be overwritten.
    """
    if out is None:
        taken = [re.fullmatch(rf"{re.escape(command)}-(\d+)", p.name) for p in _listing(runs)]
        return runs / f"{command}-{1 + max((int(m[1]) for m in taken if m), default=0)}"
    if there := check_output(Path(out), command, overwrite=overwrite, inputs=inputs):
        report(f"replaces {out}: {there}, once the new one is whole")
    return Path(out)


def take_number(command: str, runs: Path = RUNS) -> Path:
    """Make the next free `runs/<command>-<n>`, which no other process gets.

    Raises `LooptxError` where it can't be made.
    """
    while True:
        folder = next_run_dir(None, command, False, runs)
        try:
            runs.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if folder.is_dir():
                continue  # another process was faster
            raise LooptxError(f"cannot make {folder}: a file is there; choose `out`") from None
        except OSError as error:
            raise LooptxError(
                f"cannot make {folder}: {error.strerror}; choose another place by `out`"
            ) from error
        return folder


@contextmanager
def numbered(out: Path | str | None, command: str, runs: Path = RUNS) -> Iterator[Path]:
    """`out`, or the next free number, which is given back where nothing came to be there."""
    if out is not None:
        yield Path(out)
        return
    new = not runs.exists()
    folder = take_number(command, runs)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # what holds something stays
            folder.rmdir()
            if new:
                runs.rmdir()
        raise


def abilities(folder: Path) -> frozenset[str]:
    """What a model folder can do beyond text, by headers alone; an adapter by its base.

    Raises `DataError` for a folder that can't be loaded.
    """
    check_links(folder)
    if _is_adapter(folder):
        read_header(folder / "adapter_model.safetensors")
        return abilities(_base_of(folder)) - {"weights"}
    config = read_json(folder / "config.json")
    if (folder / "model.safetensors").is_file():
        read_header(folder / "model.safetensors")
    try:
        media = [medium.ability for medium in MEDIA.values() if medium.enabled(config)]
        media += [medium.write_ability for medium in MEDIA.values() if medium.writes(config)]
    except (TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{folder / 'config.json'}: {error}; copy the model again") from error
    return frozenset({"weights", *media})


def _but(skipped: list[str]) -> str:
    """What to say of runs that can't be loaded."""
    return "".join(f"; left out: {reason}" for reason in skipped)


def _given(path: Path) -> ResolvedModel:
    if path.is_file():
        from looptx_core.checkpoint.weights import refuse_pickle  # brings torch

        refuse_pickle(path)
        raise DataError(f"{path}: a file; give the folder of a run or of a model")
    if not path.exists():
        raise DataError(f"{path}: no such run or model folder; check the path")
    if _is_model(path):
        return _resolved(path, "given")
    if _is_model(path / "final"):
        return _resolved(path / "final", "given run")
    if (path / "config.yaml").is_file():
        raise DataError(
            f"{path}: this run is not finished; resume it by looptx {run_command(path)} --resume "
            f"{quoted(path)}"
        )
    raise DataError(f"{path}: neither a run nor a model folder; check the path")


def _runs(runs: Path) -> list[Path]:
    """Runs that have a model, the newest first.

    `run_summary` asks for more of a finished run, all of its steps: one that was stopped by its
    time, or that goes on beyond its first end, has a whole model to use nonetheless.
    """
    found = [p for p in _listing(runs) if (p / "config.yaml").is_file() and _is_model(p / "final")]
    return sorted(found, key=lambda run: -_settings(run / "final").stat().st_mtime_ns)


def _resolved(folder: Path, reason: str) -> ResolvedModel:
    """A model folder, or an adapter's base with it."""
    if not _is_adapter(folder):
        return ResolvedModel(folder, reason)
    return ResolvedModel(_base_of(folder), f"{reason}, with the adapter {folder}", folder)


def _base_of(adapter: Path) -> Path:
    """The base that an adapter names; a bundled one of another installation is this one's."""
    name = read_json(_settings(adapter)).get("base_model_name_or_path")
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{adapter}: names no base; give one by `model`")
    base = Path(name)
    if _is_adapter(base):  # which may be this one, or name it
        raise DataError(f"{adapter}: its base {base} is an adapter too; merge that one first")
    if _is_model(base):
        return base
    for bundled in bundled_models():
        if base.parts[-3:] == bundled.parts[-3:]:
            return bundled
    raise DataError(f"{adapter}: its base {base} is gone; give it by `model`")


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _is_model(folder: Path) -> bool:
    return _settings(folder).is_file()


def _settings(folder: Path) -> Path:
    """The file that makes a folder a model's or an adapter's."""
    return folder / ("adapter_config.json" if _is_adapter(folder) else "config.json")


def _listing(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
