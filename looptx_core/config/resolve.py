"""Merge flags, environment, file, preset and defaults; remember where each value came from.

A schema is a dataclass; its annotations say what each key may hold. Keys of a nested section are
written `model.d_model` here, `model: {d_model: ...}` in YAML and `LOOPTX_MODEL_D_MODEL` in the
environment.
"""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, get_origin, get_type_hints

import yaml

from looptx_core.atomic import write_file
from looptx_core.config.codec import CodecConfig
from looptx_core.config.conversion import ConvertConfig
from looptx_core.config.corpus import TokenizeConfig
from looptx_core.config.evaluation import EvaluateConfig
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.inspection import MEDIA_PATHS, InspectConfig
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import get_preset, suggestion
from looptx_core.config.run import TrainConfig
from looptx_core.config.serving import ServeConfig
from looptx_core.config.yaml_file import Lines, read_yaml
from looptx_core.documents import short
from looptx_core.errors import DataError, UsageError
from looptx_core.schema import coerce

PREFIX = "LOOPTX_"
ORIGINS = "origins"
"""The key of a resolved file that says where its values came from; no setting when read again."""

# Read elsewhere, so no typing mistakes: places and switches that are no key of a schema.
_OTHER_VARIABLES = {"LOOPTX_CACHE", "LOOPTX_CONFIG", "LOOPTX_MODEL", "LOOPTX_DEBUG", "LOOPTX_RUN",
                    "LOOPTX_KERNELS"}  # fmt: skip

# A `~` at the start of these is the home folder, in quotes and in files too.
_PATHS = {"codec", "data", "out", "tokenizer", "model", "adapter", "from_hf", "from_gguf", "init",
          "nvme_path", "deepspeed_config", "include_path", *MEDIA_PATHS}  # fmt: skip

_SCHEMAS: dict[str, type] = {"model": ModelConfig, "codec_model": CodecConfig}

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
        made = {}
        for name, hint in get_type_hints(schema).items():
            key = _dotted(section, name)
            made[name] = self.build(hint, key) if _is_section(hint) else self.values[key]
        return schema(**made)

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
    hints = keys_of({"": schema, **(sections or {})})
    defaults = _defaults({"": schema, **(sections or {})})

    given = {key: value for key, value in (flags or {}).items() if value not in (None, (), [])}
    assert not (unknown := given.keys() - hints), f"flags outside the schema: {unknown}"
    layers: list[Layer] = [(given, flag_name), (_environment(hints, env), _variable)]
    if file := config_file(config, env):
        settings = _settings_of(Path(at_home(str(file))), hints, sections or {})
        layers.append((settings, lambda key: str(file)))
    if "preset" in hints:
        name, _ = _first("preset", hints, [*layers, (defaults, _default)])
        preset = get_preset(name)
        flat = {**preset.get(preset_keys, {}), **dotted(preset["model"], "model")}
        layers.append(({k: v for k, v in flat.items() if k in hints}, lambda key: f"preset {name}"))
    layers.append((defaults, _default))

    values, origins = {}, {}
    for key in hints:
        found, origins[key] = _first(key, hints, layers)
        values[key] = at_home(found) if key in _PATHS else found
    return Resolved(values, origins)


def config_file(
    config: str | Path | None, env: Mapping[str, str] | None = None
) -> str | Path | None:
    """The YAML file that is read: the one given, else `LOOPTX_CONFIG`."""
    return config or (os.environ if env is None else env).get(PREFIX + "CONFIG")


def write_resolved(path: str | Path, resolved: Resolved, omit: Collection[str] = ()) -> None:
    """Write settings and their origins as YAML, which `resolve` takes again as its `config`.

    Args:
        omit: keys to leave out, such as the folder that the file itself lies in.
    Raises:
        LooptxError: the file can't be written.
    """
    path = Path(path)
    tree: dict[str, Any] = {}
    for key, value in resolved.values.items():
        if key not in omit:
            *sections, name = key.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = list(value) if isinstance(value, tuple) else value
    tree[ORIGINS] = {key: o for key, o in resolved.origins.items() if key not in omit}
    text = "# The settings of this run; give this file as `config` to use them again.\n"
    text += yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    write_file(path, text)


def read_resolved(
    path: str | Path, schema: type, sections: Mapping[str, type] | None = None
) -> Resolved:
    """Read what `write_resolved` wrote, with the origins that it recorded.

    Keys that the file lacks take their defaults; the environment is not read.

    Raises:
        DataError: no such file, or not of these schemas.
    """
    path = Path(path)
    written, _ = read_yaml(path, DataError)
    try:
        resolved = resolve(schema, sections, config=path, env={})
    except UsageError as error:  # of a file that a command wrote, not the user
        raise DataError(str(error)) from error
    recorded = written.get(ORIGINS)
    recorded = recorded if isinstance(recorded, dict) else {}
    origins = {key: str(recorded.get(key, origin)) for key, origin in resolved.origins.items()}
    return Resolved(resolved.values, origins)


def recorded(path: str | Path, key: str) -> Any:
    """One value of what `write_resolved` wrote, whichever command did; None where it has none.

    Raises `DataError` for a file that can't be read.
    """
    value = read_yaml(Path(path), DataError)[0].get(key)
    hints = get_type_hints(TrainConfig)
    try:
        return value if value is None else coerce(value, hints.get(key, Any), f"{path}: {key}")
    except UsageError as error:
        raise DataError(str(error)) from error


def dotted(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The values of a section, and of the sections inside it, by dotted key."""
    known = keys_of({section: _SCHEMAS[section]})
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = _dotted(section, name)
        inner = isinstance(value, Mapping) and key not in known
        found |= {_dotted(key, k): v for k, v in value.items()} if inner else {key: value}
    return found


def at_home(path: Any) -> Any:
    """A path, or several, with the home folder for a `~` at the start; other values stay."""
    if isinstance(path, tuple | list):
        return type(path)(at_home(part) for part in path)
    return os.path.expanduser(path) if isinstance(path, str) else path  # noqa: PTH111, keeps globs


def flag_name(key: str) -> str:
    """'flag --set model.d_model' for the key 'model.d_model', without --set for a root's key."""
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
                    default = defaults.get(name)  # a section has none of its own
                    shown = "" if default in (None, (), "") else f" (default {default})"
                    out[name] = " ".join(text.split()) + shown
    return out


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


def keys_of(schemas: Mapping[str, type]) -> dict[str, Any]:
    """The annotation of each key of these schemas, and of the sections inside them."""
    found: dict[str, Any] = {}
    for section, schema in schemas.items():
        for name, hint in get_type_hints(schema).items():
            key = _dotted(section, name)
            found |= keys_of({key: hint}) if _is_section(hint) else {key: hint}
    return found


def _defaults(schemas: Mapping[str, type]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for section, schema in schemas.items():
        for f in fields(schema):
            made = f.default_factory() if f.default_factory is not MISSING else f.default
            key = _dotted(section, f.name)
            out |= _defaults({key: type(made)}) if is_dataclass(made) else {key: made}
    return out


def _is_section(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and is_dataclass(hint)


def _environment(hints: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """This schema's values in the environment; a list is separated by commas."""
    ours = {_variable(key): key for key in hints}
    # A variable of another command is fine here, a name that no command has is a mistake.
    known = {_variable(key) for key in keys_of({"": TrainConfig, **_SCHEMAS})}
    others = (TokenizeConfig, FinetuneConfig, ConvertConfig, GenerationOptions, InspectConfig,
              EvaluateConfig, ServeConfig)  # fmt: skip
    for other in others:
        known |= {_variable(key) for key in keys_of({"": other})}
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


def _settings_of(
    path: Path, hints: Mapping[str, Any], sections: Mapping[str, type]
) -> dict[str, Any]:
    """The settings in a file, by dotted key, each of its key's type.

    Raises `UsageError`, with the line, for a key that no schema has and for another type.
    """
    return {
        key: coerce(value, hints[key], f"{where}: {key}")
        for key, (value, where) in keys_in(path, hints, sections).items()
    }


def keys_in(
    path: Path, hints: Mapping[str, Any], sections: Mapping[str, type]
) -> dict[str, tuple[Any, str]]:
    """What a file holds by dotted key, as YAML has it, each with the place where it stands.

    Raises `UsageError`, with the line, for a key that no schema has, and for one that stands both
    dotted and in its section.
    """
    tree, lines = read_yaml(path)
    flat: dict[str, tuple[Any, str]] = {}
    above = {*sections, *(key.rpartition(".")[0] for key in hints)} - {""}

    def flatten(tree: Mapping[Any, Any], *place: str) -> None:
        for name, value in tree.items():
            here = (*place, str(name))
            key, where = ".".join(here), _line(path, lines, *here)
            if key in above:
                if not isinstance(value, dict | None):
                    held = short(repr(value))
                    raise UsageError(f"{where}: {key} must hold keys of its own, not {held}")
                flatten(value or {}, *here)
            elif key in flat:
                raise UsageError(f"{where}: {key} stands twice; leave one out")
            elif key != ORIGINS:
                flat[key] = value, where

    flatten(tree)
    for key, (_, where) in flat.items():
        if key not in hints:
            near = suggestion(key, hints) or suggestion(key, _short_names(hints))
            raise UsageError(f"{where}: unknown key '{short(key)}'{near or '; remove it'}")
    return flat


def _line(path: Path, lines: Lines, *key: str) -> str:
    return f"{path}, line {lines[key]}" if key in lines else str(path)


def _short_names(hints: Mapping[str, Any]) -> dict[str, str]:
    return {key.rpartition(".")[2]: key for key in hints}


def _dotted(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _variable(key: str) -> str:
    return PREFIX + key.upper().replace(".", "_")


def _default(key: str) -> str:
    return "default"
