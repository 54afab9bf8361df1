"""`metrics.jsonl`: the records of a run, a JSON object a line."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from looptx_core.documents import lines_of, parse_json
from looptx_core.errors import DataError

FILE = "metrics.jsonl"


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a line that a kill left half-written is none."""
    records = []
    text = file.read_text("utf-8", errors="replace") if file.exists() else ""
    for line in lines_of(text):
        with suppress(DataError):
            record = parse_json(line, str(file), any_number=True)  # a loss may be NaN
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records
