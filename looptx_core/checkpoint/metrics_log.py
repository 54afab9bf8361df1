"""`metrics.jsonl`: the records of a run, a JSON object a line."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a line that a kill left half-written is none."""
    records = []
    text = file.read_text("utf-8", errors="replace") if file.exists() else ""
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records
