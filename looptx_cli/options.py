"""Flags made from a configuration's fields: one place for each name, type, default and help."""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from looptx_cli.console import flags_of, with_flags
from looptx_core.config.resolve import at_home, field_help, keys_of
from looptx_core.errors import UsageError


def with_fields(schema: type, skip: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Any]:
    """Give a command a flag for each field of `schema`; it gets them as `flags`, a mapping.

    The value of a flag that was not given is None, so that the merging can tell.
    """

    def decorate(command: Callable[..., None]) -> Any:
        names = [field.name for field in fields(schema) if field.name not in skip]
        hints, flags = get_type_hints(schema), flags_of(names)
        helps = {name: with_flags(text, flags) for name, text in field_help(schema).items()}

        def run(**given: Any) -> None:
            flags = {name: given.pop(name) for name in names}
            given = {name: _at_home(name, value) for name, value in given.items()}
            command(flags=flags, **given)

        own = get_type_hints(command, include_extras=True)
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    _flag_type(hints[name]),
                    typer.Option(help=helps.get(name), metavar=_metavar(hints[name])),
                ],
            )
            for name in names
        ]
        parameters += [
            parameter.replace(annotation=own[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "flags"
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def with_set(
    flags: Mapping[str, Any], pairs: Sequence[str] | None, sections: Mapping[str, type]
) -> dict[str, Any]:
    """The flags of a command, joined by what `--set KEY=VALUE` gives.

    sections: the schemas of dotted keys, by section; the root's keys are those of `flags`.

    Raises `UsageError` for a key that is unknown or given twice.
    """
    keys = keys_of(sections)
    short = {key.rpartition(".")[2]: key for key in reversed(keys)}
    known, joined = {*flags, *keys}, dict(flags)
    for pair in pairs or ():
        key, sign, value = (part.strip() for part in pair.partition("="))
        if not sign or not key:
            raise UsageError(f"--set {pair}: give a key and its value, as model.d_model=256")
        if key not in known:
            near = get_close_matches(key, [*known, *short], n=1)
            hint = f", did you mean '{short.get(near[0], near[0])}'?" if near else "; leave it out"
            raise UsageError(f"--set {pair}: unknown key '{key}'{hint}")
        if joined.get(key) not in (None, [], ()):
            raise UsageError(f"--set {pair}: {key} is given twice; leave one out")
        is_list = get_origin(keys.get(key)) is tuple
        joined[key] = [part for part in value.split(",") if part] if is_list else value
    return joined


def check_figure(out: Path, overwrite: bool) -> None:
    """Raise `UsageError` where a figure can't be drawn to."""
    from looptx_core.inspection.figures import FIGURES

    if out.suffix.lower() not in FIGURES:
        raise UsageError(f"--out {out}: give a name that ends in {', '.join(FIGURES)}")
    if os.path.lexists(out) and not (overwrite and out.is_file()):
        raise UsageError(f"{out} exists; pass --overwrite or choose another --out")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}; make it first")


def _at_home(name: str, value: Any) -> Any:
    """An option that is no field, with the home folder for a `~` in front of a path."""
    if isinstance(value, list):
        return [_at_home(name, part) for part in value]
    if isinstance(value, Path):
        return Path(at_home(str(value)))
    return at_home(value) if name in ("model", "adapter") else value


def _flag_type(hint: Any) -> Any:
    """What Typer reads for a field's type; the merging checks the value again."""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
        return _flag_type(kinds[0]) if len(kinds) == 1 else str | None
    if get_origin(hint) is Literal:
        return str | None
    if get_origin(hint) is tuple:
        return list[str] | None
    return hint | None


def _metavar(hint: Any) -> str | None:
    """What --help shows where a field's values are words of a list; None leaves it to Typer."""
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return _metavar(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
        if any(map(_metavar, kinds)):
            return " | ".join(_metavar(kind) or kind.__name__ for kind in kinds)
    return None
