"""Tasks as files: a YAML file that says how its JSON lines are asked and scored.

The keys are lm-eval's, in the part of its format that needs no templates: `doc_to_text` and the
like name a field of the lines. One kind is looptx's own: `output_type: probes` takes lines as
`looptx_core.data.probes` has them, texts with several marked answers, and scores each answer's
tokens where they stand.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from looptx_core.config.yaml_file import read_yaml
from looptx_core.data.probes import check_probe
from looptx_core.documents import read_json_lines
from looptx_core.errors import DataError

Kind = Literal["probes", "multiple_choice", "generate_until", "loglikelihood_rolling"]
METRICS = {
    "probes": "accuracy",
    "multiple_choice": "accuracy",
    "generate_until": "exact_match",
    "loglikelihood_rolling": "bits_per_byte",
}
_SAME = {"acc": "accuracy"}  # lm-eval's name of a metric, and ours
_MEND = "correct it"
_KEYS = {
    *("task", "dataset_path", "dataset_kwargs", "test_split", "output_type", "doc_to_text"),
    *("doc_to_target", "doc_to_choice", "target_delimiter", "generation_kwargs", "metric_list"),
    *("metadata", "tag"),
}


class NeedsHarness(Exception):
    """A task file that only lm-eval can read, and why."""


@dataclass(frozen=True)
class Task:
    """One task; `text`, `target` and `choices` are names of fields of its lines."""

    name: str
    kind: Kind
    data: Path
    text: str = ""
    target: str = ""
    choices: str = ""
    delimiter: str = " "
    until: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 16
    chance: float | None = None
    """What guessing gets."""

    @property
    def metric(self) -> str:
        return METRICS[self.kind]

    @property
    def higher_is_better(self) -> bool:
        return self.metric != "bits_per_byte"

    def lines(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The lines, with the fields that the task needs checked. Raises `DataError`."""
        found: list[dict[str, Any]] = []
        for where, value in read_json_lines(self.data, mend=_MEND):
            if limit is not None and len(found) == limit:
                break
            found.append(self._checked(value, where))
        if not found:
            raise DataError(f"{self.data}: no lines; give a task some")
        return found

    def _checked(self, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected an object with the task's fields; {_MEND}")
        if self.kind == "probes":
            return vars(check_probe(value, where, _MEND))
        wanted: dict[str, type] = {self.text: str, self.target: str}
        if self.kind == "multiple_choice":
            wanted = {self.text: str, self.choices: list, self.target: int}
        for name, kind in wanted.items():
            if name and not isinstance(value.get(name), kind):
                raise DataError(f"{where}: {name} must be {_WORDS[kind]}; {_MEND}")
        if self.kind == "multiple_choice":
            choices, gold = value[self.choices], value[self.target]
            if not all(isinstance(choice, str) and choice for choice in choices):
                raise DataError(f"{where}: {self.choices} must be texts; {_MEND}")
            if not 0 <= gold < len(choices):
                raise DataError(f"{where}: {self.target} {gold} is none of the choices; {_MEND}")
        elif not value[self.target]:
            raise DataError(f"{where}: {self.target} is empty; {_MEND}")
        return value


_WORDS: dict[type, str] = {
    str: "a text",
    list: "a list of texts",
    int: "the number of a choice, from 0",
}


def read_task(file: Path) -> Task:
    """The task of a YAML file.

    Raises `NeedsHarness` for one of lm-eval's that goes beyond this reader, and `DataError` for one
    that is wrong.
    """
    keys, _ = read_yaml(file, DataError)
    kind: Any = keys.get("output_type")
    if unknown := sorted(map(str, keys.keys() - _KEYS)):
        raise NeedsHarness(f"it has {unknown[0]}")
    if kind not in get_args(Kind):
        raise NeedsHarness(f"its output_type is {kind!r}")
    if keys.get("dataset_path") != "json":
        raise NeedsHarness("its data is no local JSON lines")
    name = keys.get("task")
    if not isinstance(name, str) or not name:
        raise DataError(f"{file}: task must be a name; {_MEND}")
    asked = [item.get("metric") for item in _mappings(keys.get("metric_list", []), file)]
    if any(_SAME.get(str(metric), metric) != METRICS[kind] for metric in asked):
        raise NeedsHarness(f"it has metrics beside {METRICS[kind]}")
    fields = {key: keys.get(key, "") for key in ("doc_to_text", "doc_to_target", "doc_to_choice")}
    for key, value in fields.items():
        if not isinstance(value, str) or any(sign in value for sign in "{}"):
            raise NeedsHarness(f"its {key} is a template")
    needed = {
        "multiple_choice": ("doc_to_text", "doc_to_target", "doc_to_choice"),
        "generate_until": ("doc_to_text", "doc_to_target"),
        "loglikelihood_rolling": ("doc_to_target",),
        "probes": (),
    }
    for key in needed[kind]:
        if not fields[key]:
            raise DataError(f"{file}: {key} is missing, the name of a field; {_MEND}")
    how = keys.get("generation_kwargs") or {}
    meta = keys.get("metadata") or {}
    if not isinstance(how, dict) or not isinstance(meta, dict):
        raise DataError(f"{file}: generation_kwargs and metadata hold keys of their own; {_MEND}")
    if how.get("do_sample") or how.get("temperature"):
        raise NeedsHarness("it draws its answers")
    until, most, chance = how.get("until", ["\n"]), how.get("max_gen_toks", 16), meta.get("chance")
    if not isinstance(most, int) or most < 1 or not isinstance(until, list | str):
        raise DataError(f"{file}: until must be texts and max_gen_toks at least 1; {_MEND}")
    return Task(
        name=name, kind=kind, data=_data(keys, file), text=fields["doc_to_text"],
        target=fields["doc_to_target"], choices=fields["doc_to_choice"],
        delimiter=str(keys.get("target_delimiter", " ")),
        until=(until,) if isinstance(until, str) else tuple(map(str, until)),
        max_new_tokens=most,
        chance=float(chance) if isinstance(chance, int | float) else None,
    )  # fmt: skip


def own_tasks(folder: Path | None = None) -> dict[str, Path]:
    """The task files of a folder by name, or those that ship with looptx. Raises `DataError`."""
    if folder is None:
        folder = Path(str(importlib.resources.files("looptx_core"))) / "assets" / "tasks"
    elif not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one with task files as `include_path`")
    found: dict[str, Path] = {}
    for file in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        name = read_yaml(file, DataError)[0].get("task")
        if isinstance(name, str):
            found[name] = file
    return found


def _data(keys: Mapping[Any, Any], file: Path) -> Path:
    """The file of lines: beside the task's own file, or where lm-eval would look."""
    split = keys.get("test_split", "test")
    kwargs = keys.get("dataset_kwargs")
    files = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    name = files.get(split) if isinstance(files, dict) else files
    if not isinstance(name, str):
        raise NeedsHarness("its data_files name no single file")
    beside = file.parent / name
    path = beside if beside.is_file() else Path(name)
    if not path.is_file():
        raise DataError(f"{file}: its data {name} is missing; {_MEND}")
    return path


def _mappings(value: Any, file: Path) -> Iterator[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{file}: metric_list must be a list of metrics; {_MEND}")
    yield from value
