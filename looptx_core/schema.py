"""Check a value against a type: how every file, flag and environment variable is read.

A type is an annotation: int, float, bool, str, `X | None`, Literal, tuple, list, dict, or a
dataclass, whose fields are the keys of a mapping.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from looptx_core.documents import COPY_AGAIN, has_half, short, some
from looptx_core.errors import DataError, LooptxError, UsageError

T = TypeVar("T")
_LARGEST = 2**63
"""Whole numbers are below this: larger ones fit no tensor and no field of a kernel."""
_MISFITS = (ValueError, TypeError, OverflowError, KeyError)


def typed(
    schema: type[T],
    values: Any,
    where: str,
    *,
    mend: str = COPY_AGAIN,
    error: type[LooptxError] = DataError,
    ignore_unknown: bool = False,
) -> T:
    """The dataclass with these values of a file; absent ones take the default.

    Args:
        where: the file, and the place in it, for messages.
        mend: the remedy, the end of an error's line.
        ignore_unknown: leave out keys that the dataclass lacks, as in files of other programs.
    Raises:
        error: not a mapping, an unknown or missing key, a value of another type, or one that
            the dataclass refuses.
    """
    if not isinstance(values, Mapping):
        raise error(f"{where}: expected keys and values, not {short(values)}; {mend}")
    hints = get_type_hints(schema)
    if unknown := sorted(str(key) for key in values.keys() - hints.keys()):
        if not ignore_unknown:
            raise error(f"{where}: unknown {some(unknown)}; upgrade looptx or remove it")
        values = {key: value for key, value in values.items() if key in hints}
    if missing := [f.name for f in fields(schema) if _is_required(f) and f.name not in values]:  # type: ignore[arg-type]
        raise error(f"{where}: {some(missing)} is missing; {mend}")
    try:
        return schema(**{key: coerce(v, hints[key], key) for key, v in values.items()})
    except LooptxError as cause:
        raise error(f"{where}: {cause}; {mend}") from cause


def _is_required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def coerce(value: Any, hint: Any, where: str) -> Any:
    """Bring a value to its annotated type, or raise `UsageError` that names `where`.

    Strings are read as the type says: the environment has nothing else, and YAML reads 1e-3 as
    a string.
    """
    try:
        return _coerce(value, hint)
    except _MISFITS as cause:
        if isinstance(cause, UsageError):  # of a part, which it names
            raise UsageError(f"{where}, {cause}") from None
        raise UsageError(f"{where}: expected {_describe(hint)}, not {short(repr(value))}") from None


def _coerce(value: Any, hint: Any) -> Any:
    """The value as `hint`; ValueError or TypeError where it is none."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for choice in choices:
            try:
                return _coerce(value, choice)
            except _MISFITS:
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
    if origin is list:
        if not isinstance(value, list):
            raise TypeError
        return [coerce(part, choices[0], f"item {n}") for n, part in enumerate(value, 1)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError
        return {_text(key): coerce(part, choices[1], str(key)) for key, part in value.items()}
    if isinstance(hint, type) and is_dataclass(hint):
        return typed(hint, value, "in it", mend="mend it", error=UsageError)
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
        whole = int(value)
        if abs(whole) >= _LARGEST:
            raise ValueError
        return whole
    if hint is float:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    if hint is str:
        text = _text(value)
        if has_half(text):  # bytes that are not UTF-8, of an argument or the environment
            raise ValueError
        return text
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
    if origin in (list, dict) or is_dataclass(hint):
        return "a list" if origin is list else "keys and values"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return "none" if hint is types.NoneType else names.get(hint, str(hint))
