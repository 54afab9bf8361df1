"""Fill the generated parts of docs/reference from the code.

    python docs/generate.py            rewrite the pages
    python docs/generate.py --check    exit with 1 if a page is stale

A page holds `<!-- generated: NAME ARGUMENTS -->` and `<!-- end -->`; what stands between them is
written here, by the function `NAME`. Everything else on a page is written by hand.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from looptx_cli.console import flags_of, with_flags
from looptx_cli.main import command_function, load_command
from looptx_core import errors
from looptx_core.config.codec import CodecConfig
from looptx_core.config.conversion import ConvertConfig
from looptx_core.config.corpus import TokenizeConfig
from looptx_core.config.evaluation import EvaluateConfig
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.inspection import InspectConfig
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import PRESETS
from looptx_core.config.resolve import field_help
from looptx_core.config.run import TrainConfig
from looptx_core.config.serving import ServeConfig

REFERENCE = Path(__file__).parent / "reference"
_BLOCK = re.compile(r"(<!-- generated: ([\w -]+?) -->\n).*?(<!-- end -->)", re.DOTALL)

SCHEMAS: dict[str, type] = {
    "tokenize": TokenizeConfig,
    "train": TrainConfig,
    "finetune": FinetuneConfig,
    "convert": ConvertConfig,
    "generate": GenerationOptions,
    "chat": GenerationOptions,
    "inspect-loops": InspectConfig,
    "evaluate": EvaluateConfig,
    "serve": ServeConfig,
    "model": ModelConfig,
    "exit": ExitSettings,
    "codec": CodecConfig,
}
"""The dataclass behind a command's flags, or behind a part of a file."""


def flags(command: str) -> str:
    """All flags of a command, one table for each panel of its --help."""
    loaded = load_command(command)
    shown = loaded.get_params(typer.Context(loaded))
    parameters = [p for p in shown if p.name != "help"]
    rows = {
        panel: [_flag(p, command) for p in parameters if _panel(p) == panel]
        for panel in dict.fromkeys(_panel(p) for p in parameters)
    }
    return "\n".join(
        (f"### {panel}\n\n" if panel else "") + _table(_FLAG_HEAD, part)
        for panel, part in rows.items()
    )


def examples(command: str) -> str:
    """The lines of a command's --help that can be typed."""
    lines = (line.strip() for line in (load_command(command).help or "").splitlines())
    return "```sh\n" + "\n".join(line for line in lines if "looptx" in line) + "\n```\n"


def keys(name: str) -> str:
    """All keys of a dataclass."""
    return _table(("Key", "Values", "Default", "Meaning"), _key_rows(SCHEMAS[name]))


def _key_rows(schema: type, above: str = "") -> list[tuple[str, str, str, str]]:
    """A row for each key, those of a section after one another."""
    hints, helps, rows = get_type_hints(schema), _helps(schema), []
    for field in fields(schema):
        key, hint = above + field.name, hints[field.name]
        if is_dataclass(hint):
            rows += _key_rows(hint, f"{key}.")
            continue
        meaning = _as_text(helps[field.name])
        rows.append((f"`{key}`", _values(hint), _shown(_default(field)), meaning))
    return rows


def presets() -> str:
    """What each preset sets, beside the defaults."""
    part_keys = {
        (part, key): None for preset in PRESETS.values() for part in preset for key in preset[part]
    }
    rows = []
    for part, key in part_keys:
        name = f"model.{key}" if part == "model" else key
        schema = ModelConfig if part == "model" else TrainConfig
        default = next(_default(field) for field in fields(schema) if field.name == key)
        values = [PRESETS[preset].get(part, {}).get(key, default) for preset in PRESETS]
        rows.append((f"`{name}`", *(_shown(value) for value in values)))
    return _table(("Key", *PRESETS), rows)


def exit_codes() -> str:
    """The codes that errors end a command with, from the classes of errors."""
    kinds = (kind for _, kind in inspect.getmembers(errors, inspect.isclass))
    codes = {kind.exit_code: kind for kind in kinds if issubclass(kind, errors.LooptxError)}
    rows: list[tuple[str, ...]] = [("0", "", "Done.")]
    for code, kind in sorted(codes.items()):
        meaning = re.sub(r" \(exit code \d+\)", "", inspect.getdoc(kind) or "")
        rows.append((str(code), f"`{kind.__name__}`", _one_line(meaning)))
    return _table(("Code", "Error in Python", "Meaning"), rows)


_FLAG_HEAD = ("Flag", "Key", "Values", "Default", "Meaning")


def _flag(parameter: Any, command: str) -> tuple[str, ...]:
    schema = SCHEMAS.get(command)
    known = {field.name: field for field in fields(schema)} if schema else {}
    key = ""
    if parameter.name in known:
        key, field = f"`{parameter.name}`", known[parameter.name]
        values = _values(get_type_hints(schema)[field.name])
        default = _default(field)
        text = with_flags(_helps(schema)[field.name], flags_of(known))
    else:
        values = _values(_annotations(command)[parameter.name])
        default, text = parameter.default, parameter.help or ""
    if parameter.param_type_name == "argument":
        name = f"`{(parameter.metavar or parameter.name).upper()}`"
    else:
        name = ", ".join(
            f"`{spelling}`" for spelling in (*parameter.opts, *parameter.secondary_opts)
        )
    return name, key, values, _shown(default), _as_text(text)


def _panel(parameter: Any) -> str | None:
    return getattr(parameter, "rich_help_panel", None)


def _annotations(command: str) -> dict[str, Any]:
    """The types of a command's own parameters, those beside its schema."""
    return get_type_hints(command_function(command))


def _helps(schema: type) -> dict[str, str]:
    """The help of each field, without the default that `field_help` adds."""
    return {
        name: re.sub(r" \(default [^()]*(\([^()]*\))?\)$", "", text)
        for name, text in field_help(schema).items()
    }


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _values(hint: Any) -> str:
    """What a type allows, in words."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_values(part) for part in choices if part is not types.NoneType)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in choices)
    if origin in (tuple, list):
        return f"{_values(choices[0])}, may be repeated"
    if origin is Mapping:
        return "a section of its own"
    return {int: "integer", float: "number", str: "text", bool: "on or off", Path: "path"}[hint]


def _shown(value: Any) -> str:
    if value is None or value in ((), "", {}):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(f"`{part}`" for part in value)
    return f"`{value}`"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |\n"

    head = tuple(head)
    return line(head) + line("---" for _ in head) + "".join(line(row) for row in rows)


def _as_text(text: str) -> str:
    """Text as Markdown that shows it: brackets outside of code are no links and no tags."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [part.replace("[", r"\[").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def _one_line(text: str) -> str:
    return " ".join(text.split())


BLOCKS: dict[str, Callable[..., str]] = {
    "flags": flags,
    "examples": examples,
    "keys": keys,
    "presets": presets,
    "exit-codes": exit_codes,
}


def filled(page: str) -> str:
    """The text of a page with its generated blocks as the code has them now."""

    def block(found: re.Match[str]) -> str:
        name, *arguments = found[2].split()
        return f"{found[1]}\n{BLOCKS[name](*arguments)}\n{found[3]}"

    return _BLOCK.sub(block, page)


def stale_pages() -> list[Path]:
    """Pages whose generated blocks differ from what the code has now."""
    pages = sorted(REFERENCE.rglob("*.md"))
    return [page for page in pages if page.read_text("utf-8") != filled(page.read_text("utf-8"))]


def main() -> int:
    stale = stale_pages()
    if "--check" in sys.argv[1:]:
        for page in stale:
            print(f"{page} is stale; run python docs/generate.py")
        return 1 if stale else 0
    for page in stale:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
        print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
