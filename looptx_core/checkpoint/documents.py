"""JSON documents that a user hands over, and what is wrong with one in a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from looptx_core.config.resolve import coerce
from looptx_core.errors import DataError, UsageError

T = TypeVar("T")


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{file.parent}: {file.name} is missing; copy the model again") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file}: not valid JSON ({reason}); copy the model again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected a JSON object; copy the model again")
    return content


def typed(schema: type[T], values: Mapping[str, Any], where: str) -> T:
    """The dataclass with these values; keys that an older format lacks take their defaults."""
    hints = get_type_hints(schema)
    if unknown := sorted(values.keys() - hints.keys()):
        raise DataError(f"{where}: unknown {some(unknown)}; upgrade looptx or remove it")
    try:
        return schema(**{key: coerce(v, hints[key], key) for key, v in values.items()})
    except UsageError as error:
        raise DataError(f"{where}: {error}; copy the model again") from error


def to_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def some(names: list[str]) -> str:
    """'a, b, c and 4 more'."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
