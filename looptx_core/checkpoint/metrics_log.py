"""`metrics.jsonl`: the records of a run, a JSON object a line."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from looptx_core.documents import lines_of, open_input, parse_json
from looptx_core.errors import DataError

FILE = "metrics.jsonl"


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, without values of another type than their key's; a line
    that a kill left half-written is none.

    Raises `DataError` where it is no file that can be read.
    """
    records: list[dict[str, Any]] = []
    if not file.exists():
        return records
    try:
        with open_input(file, pipes=False) as stream:
            text = stream.read().decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); remove it") from error
    for line in lines_of(text):
        with suppress(DataError):
            record = parse_json(line, str(file), any_number=True)  # a loss may be NaN
            if isinstance(record, dict) and type(record.get("step")) is int:
                records.append({key: item for key, item in record.items() if _fits(key, item)})
    return [record for record in records if "step" in record]


def _fits(key: str, value: Any) -> bool:
    """Whether a value is of the type that `JsonLines` writes under this key."""
    if key == "stretch":
        return isinstance(value, dict)
    if key.endswith("_by_loop"):
        return isinstance(value, list) and value != [] and all(map(_is_number, value))
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)
