"""Merge flags, environment, file, preset and defaults; remember where each value came from.

A schema is a dataclass; its annotations say what each key may hold. Keys of a nested section are
written `model.d_model` here, `model: {d_model: ...}` in YAML and `LOOPTX_MODEL_D_MODEL` in the
environment.
"""

from __future__ import annotations

import ast
import inspect
import math
import os
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from looptx_core.config.conversion import ConvertConfig
from looptx_core.config.corpus import TokenizeConfig
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.inspection import InspectConfig
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import get_preset, suggestion
from looptx_core.config.run import TrainConfig
from looptx_core.errors import LooptxError, UsageError

PREFIX = "LOOPTX_"
ORIGINS = "origins"
"""The key of a resolved file that says where its values came from; ignored in `--config`."""

# Read elsewhere, so no typing mistakes: places and switches that are no key of a schema.
_OTHER_VARIABLES = {"LOOPTX_CACHE", "LOOPTX_CONFIG", "LOOPTX_MODEL", "LOOPTX_DEBUG", "LOOPTX_RUN",
                    "LOOPTX_KERNELS"}  # fmt: skip

T = TypeVar("T")
Layer = tuple[Mapping[str, Any], Callable[[str], str]]
"""Values by key, and the origin to report for a key."""


@dataclass(frozen=True)
class Resolved:
    """Merged settings. Keys of a nested section are dotted, as in `model.d_model`."""

    values: dict[str, Any]
    origins: dict[str, str]

    def build(self, schema: type[T], section: str = "") -> T:
        """The dataclass of a section ('' is the root). Raises what its own checks raise."""
        return schema(**{f.name: self.values[_join(section, f.name)] for f in fields(schema)})  # type: ignore[arg-type]

    def given(self, key: str) -> bool:
        """Whether a flag, the environment or the file set this key."""
        return not self.origins[key].startswith(("default", "preset "))


def resolve(
    schema: type,
    sections: Mapping[str, type] | None = None,
    *,
    flags: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    preset_keys: str = "train",
) -> Resolved:
    """Merge all layers by precedence: flags, environment, `config`, preset, defaults.

    Args:
        schema: the root's keys; where it has a `preset`, that preset joins the layers.
        sections: nested schemas, such as {"model": ModelConfig}.
        flags: values by key (dotted for a section); None, () and [] mean not given.
        config: a YAML file; absent: `LOOPTX_CONFIG`.
        env: the environment; absent: this process's.
        preset_keys: which part of a preset holds the root's keys.
    Raises:
        UsageError: an unknown key, preset or a value of the wrong type, in any layer.
    """
    env = os.environ if env is None else env
    hints = _keys({"": schema, **(sections or {})})
    defaults = _defaults({"": schema, **(sections or {})})

    given = {key: value for key, value in (flags or {}).items() if value not in (None, (), [])}
    assert not (unknown := given.keys() - hints), f"flags outside the schema: {unknown}"
    layers: list[Layer] = [(given, flag_name), (_environment(hints, env), _variable)]
    if file := config_file(config, env):
        layers.append((_read_yaml(Path(file), hints, sections or {}), lambda key: str(file)))
    if "preset" in hints:
        name, _ = _first("preset", hints, [*layers, (defaults, _default)])
        preset = get_preset(name)
        flat = {**preset.get(preset_keys, {}), **_flat("model", preset["model"])}
        layers.append(({k: v for k, v in flat.items() if k in hints}, lambda key: f"preset {name}"))
    layers.append((defaults, _default))

    values, origins = {}, {}
    for key in hints:
        values[key], origins[key] = _first(key, hints, layers)
    return Resolved(values, origins)


def config_file(
    config: str | Path | None, env: Mapping[str, str] | None = None
) -> str | Path | None:
    """The YAML file that is read: the one given, else `LOOPTX_CONFIG`."""
    return config or (os.environ if env is None else env).get(PREFIX + "CONFIG")


def write_resolved(path: str | Path, resolved: Resolved, omit: Collection[str] = ()) -> None:
    """Write settings and their origins as YAML that serves as `--config` again.

    Args:
        omit: keys to leave out, such as the folder that the file itself lies in.
    Raises:
        LooptxError: the file can't be written.
    """
    path = Path(path)
    tree: dict[str, Any] = {}
    for key, value in resolved.values.items():
        if key not in omit:
            section, _, name = key.rpartition(".")
            place = tree.setdefault(section, {}) if section else tree
            place[name] = list(value) if isinstance(value, tuple) else value
    tree[ORIGINS] = {key: o for key, o in resolved.origins.items() if key not in omit}
    text = "# The settings of this run; use them again with --config.\n"
    text += yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    except OSError as error:
        raise LooptxError(
            f"cannot write {path}: {error.strerror}; free some space or choose another --out"
        ) from error


def read_resolved(
    path: str | Path, schema: type, sections: Mapping[str, type] | None = None
) -> Resolved:
    """Read what `write_resolved` wrote, with the origins that it recorded.

    Keys that the file lacks take their defaults; the environment is not read.

    Raises:
        UsageError: no such file, or not of these schemas.
    """
    path = Path(path)
    resolved = resolve(schema, sections, config=path, env={})
    written = _load_yaml(path)
    recorded = written.get(ORIGINS) or {}
    origins = {key: str(recorded.get(key, origin)) for key, origin in resolved.origins.items()}
    return Resolved(resolved.values, origins)


def recorded(path: str | Path, key: str) -> Any:
    """One value of what `write_resolved` wrote, whichever command did; None where it has none."""
    return _load_yaml(Path(path)).get(key)


def flag_name(key: str) -> str:
    """'flag --batch-size' for the key 'batch_size', 'flag --set model.d_model' for a section's."""
    return f"flag --set {key}" if "." in key else "flag --" + key.replace("_", "-")


def field_help(schema: type) -> dict[str, str]:
    """The docstring of each field, with its default: the help of its flag."""
    defaults = _defaults({"": schema})
    out = {}
    for part in reversed([cls for cls in schema.__mro__ if is_dataclass(cls)]):
        body = ast.parse(inspect.getsource(part)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, doc in zip(body.body, body.body[1:]):
            match field, doc:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    default = defaults[name]
                    shown = "" if default in (None, (), "") else f" (default {default})"
                    out[name] = " ".join(text.split()) + shown
    return out


def coerce(value: Any, hint: Any, where: str) -> Any:
    """Bring a value to its annotated type, or raise `UsageError` that names `where`.

    Strings are read as the type says: the environment has nothing else, and YAML reads 1e-3 as
    a string.
    """
    try:
        return _coerce(value, hint)
    except (ValueError, TypeError, OverflowError, KeyError):
        raise UsageError(f"{where}: expected {_describe(hint)}, not {value!r}") from None


def _coerce(value: Any, hint: Any) -> Any:
    """The value as `hint`; ValueError or TypeError where it is none."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for choice in choices:
            try:
                return _coerce(value, choice)
            except (ValueError, TypeError, OverflowError, KeyError):
                continue
        raise ValueError
    if origin is Literal:
        if value not in choices:
            raise ValueError
        return value
    if origin is tuple:
        parts = value if isinstance(value, list | tuple) else [value]
        if len(choices) == 2 and choices[1] is ...:
            return tuple(_coerce(part, choices[0]) for part in parts)
        if len(parts) != len(choices):
            raise ValueError
        return tuple(_coerce(part, choice) for part, choice in zip(parts, choices))
    if hint is types.NoneType:
        if value is None or (isinstance(value, str) and value.lower() in ("", "none", "null")):
            return None
        raise ValueError
    if hint is bool:
        words = {"true": True, "yes": True, "on": True, "1": True}
        words |= {"false": False, "no": False, "off": False, "0": False}
        return value if isinstance(value, bool) else words[_text(value).lower()]
    if isinstance(value, bool):
        raise TypeError
    if hint is int:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError
        return int(value)
    if hint is float:
        number = float(value)
        if math.isnan(number):
            raise ValueError
        return number
    if hint is str:
        return _text(value)
    return value


def _text(value: Any) -> str:
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise TypeError
    return value


def _describe(hint: Any) -> str:
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in choices)
    if origin is Literal:
        return " or ".join(str(choice) for choice in choices)
    if origin is tuple:
        return f"a list of {_describe(choices[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return "none" if hint is types.NoneType else names.get(hint, str(hint))


def _first(key: str, hints: Mapping[str, Any], layers: Iterable[Layer]) -> tuple[Any, str]:
    """The value and origin of the first layer that has the key; the defaults have every key."""
    for values, origin in layers:
        if key in values:
            where = origin(key)
            if origin is _default:
                return values[key], where
            name = where if where.startswith(("flag ", PREFIX)) else f"{where}: {key}"
            return coerce(values[key], hints[key], name), where
    raise AssertionError(f"no default for {key}")


def _keys(schemas: Mapping[str, type]) -> dict[str, Any]:
    """The annotation of each key of these schemas."""
    return {
        _join(section, name): hint
        for section, schema in schemas.items()
        for name, hint in get_type_hints(schema).items()
    }


def _defaults(schemas: Mapping[str, type]) -> dict[str, Any]:
    out = {}
    for section, schema in schemas.items():
        for f in fields(schema):
            made = f.default_factory() if f.default_factory is not MISSING else f.default
            out[_join(section, f.name)] = made
    return out


def _environment(hints: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """This schema's values in the environment; a list is separated by commas."""
    ours = {_variable(key): key for key in hints}
    # A variable of another command is fine here, a name that no command has is a mistake.
    known = {_variable(key) for key in _keys({"": TrainConfig, "model": ModelConfig})}
    others = (TokenizeConfig, FinetuneConfig, ConvertConfig, GenerationOptions, InspectConfig)
    for other in others:
        known |= {_variable(key) for key in _keys({"": other})}
    known |= ours.keys() | _OTHER_VARIABLES
    values: dict[str, Any] = {}
    for name, text in env.items():
        if name in ours:
            key = ours[name]
            is_list = get_origin(hints[key]) is tuple
            values[key] = [part for part in text.split(",") if part] if is_list else text
        elif name.startswith(PREFIX) and name not in known:
            raise UsageError(
                f"unknown environment variable {name}{suggestion(name, known)}; unset it"
            )
    return values


def _read_yaml(
    path: Path, hints: Mapping[str, Any], sections: Mapping[str, type]
) -> dict[str, Any]:
    """The keys of a file, dotted. Raises `UsageError` for one that no schema has."""
    flat: dict[str, Any] = {}
    for key, value in _load_yaml(path).items():
        if key in sections:
            if not isinstance(value, dict | None):
                raise UsageError(f"{path}: {key} must hold keys of its own, not {value!r}")
            flat |= _flat(str(key), value or {})
        elif key != ORIGINS:
            flat[str(key)] = value
    for key in flat:
        if key not in hints:
            near = suggestion(key, hints) or suggestion(key, _short_names(hints))
            raise UsageError(f"{path}: unknown key '{key}'{near or '; remove it'}")
    return flat


def _short_names(hints: Mapping[str, Any]) -> dict[str, str]:
    return {key.rpartition(".")[2]: key for key in hints}


def _load_yaml(path: Path) -> dict[Any, Any]:
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot read the configuration ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not UTF-8 text"
        raise UsageError(f"{path}{line}: not valid YAML ({problem}); correct it") from error
    if not isinstance(tree, dict | None):
        raise UsageError(f"{path}: expected keys and values, as in 'lr: 0.001'")
    return tree or {}


def _flat(section: str, values: Mapping[Any, Any]) -> dict[str, Any]:
    return {_join(section, str(key)): value for key, value in values.items()}


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _variable(key: str) -> str:
    return PREFIX + key.upper().replace(".", "_")


def _default(key: str) -> str:
    return "default"
