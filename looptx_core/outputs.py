"""What a command may write to, and what it may replace there.

A folder that looptx wrote carries a JSON document that names the command (its marker), and holds
nothing but what that command writes. Only such a folder is ever replaced, only by the same
command, and never while it holds an input of the new one.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import socket
import uuid
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from looptx_core.errors import UsageError

_MODEL = (
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "preprocessor_config.json", "README.md"),
    "data.json",
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("adapter_config.json", "adapter_model.safetensors", "looptx.json", "loop_*/adapter_*"),
    *("loop_*/README.md", "codec-*/*.json", "codec-*/*.safetensors", "digests.json"),
)
_CORE = Path(__file__).parent
# An export holds modules of this package, each named by where it stands.
_EXPORT = (
    *("modeling_looptx.py", "__pycache__/*.pyc"),
    *("_".join(module.relative_to(_CORE).parts) for module in sorted(_CORE.rglob("*.py"))),
)
# What a writer that was killed left: a name that `_own_name` made.
_LEFT = re.compile(r"\..+\.[0-9a-f]{8}-\d+-[0-9a-f]{8}\.(tmp|old)")
_RUN = (
    *(
        "run.json",
        "run.lock",
        "config.yaml",
        "metrics.jsonl",
        "kernels.json",
        "curves.png",
        "curves.partial.png",
    ),
    *("config.yaml.tmp", "kernels.json.*.tmp", "csv/*", "tensorboard/*", "swap/**"),
    *("checkpoints/step-[0-9]*", "checkpoints/step-[0-9]*/**", "checkpoints/.*.tmp"),
    *(f"final/{name}" for name in _MODEL),
)


@dataclass(frozen=True)
class Output:
    """What a command leaves. noun: for messages. marker: the document that names the command.
    holds: patterns of all its files, relative to the folder: `*` within a name, `**` at the end for
    whatever is below."""

    noun: str
    marker: str
    holds: tuple[str, ...]


OUTPUTS = {
    "train": Output("run of looptx train", "run.json", _RUN),
    "finetune": Output("run of looptx finetune", "run.json", _RUN),
    "convert": Output("model of looptx convert", "config.json", (*_MODEL, *_EXPORT)),
    "tokenize": Output(
        "tokenised data of looptx tokenize",
        "manifest.json",
        ("manifest.json", "tokenizer.json", "probes.jsonl", "train-*.bin", "val-*.bin"),
    ),
    "inspect-loops": Output(
        "report of looptx inspect-loops",
        "report.json",
        (
            *("report.json", "report.html", "loops.png", "frontier.png", "confidence.png"),
            *("tasks.png", "*-[0-9]*.png"),  # the latter are of the media that were looked at
        ),
    ),
}


def check_output(
    folder: Path, command: str, *, overwrite: bool, inputs: Iterable[str | Path | None] = ()
) -> str:
    """Check that a command may write to a folder.

    Args:
        inputs: what the command reads: paths, patterns, or names that are no paths; None is none.
    Returns:
        What is there and will be replaced, in words; '' where the place is free.
    Raises:
        UsageError: the folder holds something that may not be replaced.
    """
    if not os.path.lexists(folder):
        return ""
    try:
        held = holds_anything(folder)
    except OSError as error:
        raise UsageError(
            f"{folder}: not a folder to write to ({error.strerror}); choose another `out`"
        ) from error
    if not held:
        return ""
    if not overwrite:
        raise UsageError(f"{folder} exists; pass `overwrite` or choose another `out`")
    keep = f"{folder} is not replaced"
    place, here = folder.resolve(), Path.cwd()
    if here == place or place in here.parents:
        raise UsageError(f"{keep}, as it holds the working folder; choose another `out`")
    for name in inputs:
        for path in _paths(name):
            if path == place or place in path.parents:
                raise UsageError(f"{keep}, as {name} is read from there; choose another `out`")
    kind = OUTPUTS[command]
    if (maker := made_by(folder, kind.marker)) != command:
        found = f"; looptx {maker} made it" if maker else ""
        raise UsageError(f"{folder} is no {kind.noun}, so {keep}{found}; choose another `out`")
    return "a " + kind.noun + ", " + describe_contents(folder, kind.holds)


def holds_anything(folder: Path) -> bool:
    """Whether a folder holds more than what a run leaves that was killed before it began."""
    return any(p.name != "run.lock" and not _LEFT.fullmatch(p.name) for p in folder.iterdir())


def describe_contents(folder: Path, holds: Iterable[str]) -> str:
    """The number of files and their size. Raises `UsageError` for one that is not of `holds`."""
    holds, count, size = tuple(holds), 0, 0
    for file in _files(folder):
        name = file.relative_to(folder).as_posix()
        if not any(_LEFT.fullmatch(part) for part in name.split("/")) and not any(
            _matches(name, pattern) for pattern in holds
        ):
            raise UsageError(
                f"{folder} holds {name}, which looptx did not make, so it is not replaced; move "
                "it away or choose another `out`"
            )
        count += 1
        size += file.lstat().st_size
    return f"{count:,} file{'s' if count > 1 else ''} of {size / 1e6:,.1f} MB"


def _matches(name: str, pattern: str) -> bool:
    """Whether a relative path is of a pattern, part by part."""
    parts, wanted = name.split("/"), pattern.split("/")
    if wanted[-1] == "**" and len(parts) >= len(wanted):
        wanted = wanted[:-1]
        parts = parts[: len(wanted)]
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def check_model_target(folder: Path, overwrite: bool) -> None:
    """Check that a model may be saved to a folder: a free place, or a looptx model alone.

    Raises:
        UsageError: the folder holds something else, or may not be replaced.
    """
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{folder} exists; pass `overwrite` or choose another `out`")
    if not folder.is_dir() or _document(folder / "config.json").get("model_type") != "looptx":
        raise UsageError(
            f"{folder} is no looptx model, so it is not replaced; choose another `out`"
        )
    describe_contents(folder, (*_MODEL, *_EXPORT))


def made_by(folder: Path, marker: str) -> str | None:
    """The command that a folder's marker names."""
    command = _document(folder / marker).get("command")
    return command if isinstance(command, str) and command in OUTPUTS else None


def temporary_beside(target: Path) -> Path:
    """A name beside `target` that no other writer uses.

    What a writer that was killed left there is removed; where it was killed between the renames
    of `put_in_place`, the former folder is put back.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.*"):
        # A name such as .y.new.<writer>.old is another target's.
        own = left.name.removeprefix(f".{target.name}")
        if not _LEFT.fullmatch(f".y{own}") or own.count(".") != 2 or not _writer_is_gone(left):
            continue
        if left.suffix == ".old" and not os.path.lexists(target):
            left.rename(target)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    return _own_name(target, "tmp")


def put_in_place(new: Path, target: Path) -> None:
    """Rename a finished folder to `target`; what was there is removed only once it is there.

    Raises `OSError`; what was there is back in its place then.
    """
    old = _own_name(target, "old")
    try:
        target.rename(old)
    except FileNotFoundError:
        new.rename(target)
        return
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _document(file: Path) -> dict[str, object]:
    """A JSON document; an unreadable one is empty."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _paths(name: str | Path | None) -> Iterator[Path]:
    """The files and folders that an input names, as written and with links followed."""
    if name is None:
        return
    text = os.fspath(name)
    found = glob.glob(text, recursive=True) if glob.has_magic(text) else []  # noqa: PTH207
    for path in [Path(text), *map(Path, found)]:
        if os.path.lexists(path):
            yield path.parent.resolve() / path.name
            yield path.resolve()


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, links among them, none of which is followed."""
    for root, folders, files in os.walk(folder):
        for name in sorted(files) + [n for n in folders if (Path(root) / n).is_symlink()]:
            yield Path(root) / name


def _own_name(target: Path, end: str) -> Path:
    own = f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return target.with_name(f".{target.name}.{own}.{end}")


def _machine() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _writer_is_gone(path: Path) -> bool:
    """Whether a name that `_own_name` made is of a process of this machine that has ended."""
    found = re.search(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.(tmp|old)$", path.name)
    return found is not None and found[1] == _machine() and not is_running(int(found[2]))


def is_running(process: int) -> bool:
    """Whether a process of this machine runs, by its number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True
