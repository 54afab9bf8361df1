"""What a command may write to, and what it may replace there.

A folder that looptx wrote carries a JSON document that names the command (its marker), and holds
nothing but what that command writes. Only such a folder is ever replaced, only by the same
command, and never while it holds an input of the new one.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from looptx_core.atomic import is_temporary
from looptx_core.documents import read_json
from looptx_core.errors import DataError, UsageError

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
    *("model.onnx", "model.onnx.data", "genai_config.json", "*.gguf"),
    *("_".join(module.relative_to(_CORE).parts) for module in sorted(_CORE.rglob("*.py"))),
)
_RUN = (
    *(
        "run.json",
        "run.lock",
        "config.yaml",
        "metrics.jsonl",
        "kernels.json",
        "kernels-[0-9]*.json",  # of further processes
        "curves.png",
    ),
    *("csv/*", "tensorboard/*", "swap/**"),
    *("checkpoints/step-[0-9]*", "checkpoints/step-[0-9]*/**"),
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
    "codec": Output("codec of looptx tokenize", "codec.json", ("codec.json", "codec.safetensors")),
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
    return any(p.name != "run.lock" and not is_temporary(p.name) for p in folder.iterdir())


def describe_contents(folder: Path, holds: Iterable[str]) -> str:
    """The number of files and their size. Raises `UsageError` for one that is not of `holds`."""
    holds, count, size = tuple(holds), 0, 0
    for file in _files(folder):
        name = file.relative_to(folder).as_posix()
        if not any(map(is_temporary, name.split("/"))) and not any(
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


def _document(file: Path) -> dict[str, object]:
    """A JSON document; an unreadable one is empty."""
    try:
        return read_json(file)
    except DataError:
        return {}


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
