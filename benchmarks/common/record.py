"""The record that every benchmark writes: one schema, one place, one check.

A record is a JSON object with the keys of `FIELDS`. Its rows are flat: a value is a number, a
string, a truth value, null, or a list of these (a curve over loops, for example). A record lies at
`benchmarks/<question>/results/<script>_<variant>_<machine>.json`, without the script where it is
`run`; a new run on the same machine replaces it, and git keeps the former one.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCHEMA_VERSION = 1
FIELDS: dict[str, type] = {
    "schema_version": int,
    "benchmark": str,  # the module below `benchmarks`: "decode_speed.run"
    "variant": str,  # which settings or model, where a script has several; else ""
    "what": str,  # what was measured, in a sentence
    "command": str,
    "commit": str,  # whose code ran
    "date": str,  # YYYY-MM-DD
    "machine": dict,  # name (str), threads (int, or null where it was not kept), state (str)
    "versions": dict,  # of looptx, torch, Python and the peers
    "settings": dict,  # flat, of the whole run
    "rows": list,
}
_COMMIT = re.compile(r"[0-9a-f]{7,40}(\+changes)?|unknown")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")

Record = dict[str, Any]
Row = dict[str, Any]


def check(record: Record) -> None:
    """Raise ValueError that says what is wrong with a record."""
    if missing := FIELDS.keys() ^ record.keys():
        raise ValueError(f"keys that are missing or unknown: {', '.join(sorted(missing))}")
    for name, kind in FIELDS.items():
        if not isinstance(record[name], kind):
            raise ValueError(f"{name} is not {kind.__name__}")
    if record["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {record['schema_version']}, not {SCHEMA_VERSION}")
    if not _COMMIT.fullmatch(record["commit"]):
        raise ValueError(f"commit {record['commit']!r} is no hash")
    if not _DATE.fullmatch(record["date"]):
        raise ValueError(f"date {record['date']!r} is not YYYY-MM-DD")
    if record["machine"].keys() != {"name", "threads", "state"} or not record["machine"]["name"]:
        raise ValueError("machine needs name, threads and state")
    if not record["rows"]:
        raise ValueError("rows is empty")
    for number, row in enumerate([record["settings"], *record["rows"]]):
        for key, value in row.items():
            if not _flat(value):
                raise ValueError(f"row {number}, {key}: {type(value).__name__} is not flat")


def _flat(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_flat, value))
    return value is None or isinstance(value, str | int | float)


def write(
    benchmark: str,
    what: str,
    rows: Iterable[Row],
    *,
    variant: str = "",
    settings: Row | None = None,
    peers: Sequence[str] = (),
    threads: int | None = None,
    on_gpu: bool = False,
    file: Path | None = None,
) -> Path:
    """Check a record of this run and write it to its file (or to `file`), which is returned.

    peers: installed distributions whose versions matter. threads: torch's by default.
    """
    import torch

    record = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "variant": variant,
        "what": what,
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "name": machine(on_gpu),
            "threads": torch.get_num_threads() if threads is None else threads,
            "state": "",
        },
        "versions": {
            **{name: version(name) for name in ("looptx", "torch", *peers)},
            "python": platform.python_version(),
        },
        "settings": settings or {},
        "rows": list(rows),
    }
    check(record)
    file = file or results_file(benchmark, variant, on_gpu)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump(record), "utf-8")
    print(f"wrote {file}", file=sys.stderr)
    return file


def finish(benchmark: str, what: str, rows: Iterable[Row], checks: bool, **settings: Any) -> int:
    """End a script: write the record, unless it only checks; returns the exit status."""
    if not checks:
        write(benchmark, what, rows, settings=settings)
    return 0


def dump(record: Record) -> str:
    """As JSON, a line for each row."""
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in record["rows"])
    head = json.dumps({**record, "rows": []}, indent=1, ensure_ascii=False)
    return head.replace('"rows": []', f'"rows": [\n{rows}\n ]') + "\n"


def results_file(benchmark: str, variant: str = "", on_gpu: bool = False) -> Path:
    """Where a record of this machine belongs; all in the folder $BENCH_RESULTS where it is set."""
    question, script = benchmark.split(".")
    parts = ["" if script == "run" else script, variant, machine(on_gpu)]
    name = "_".join(filter(None, map(slug, parts))) + ".json"
    if folder := os.environ.get("BENCH_RESULTS"):
        return Path(folder) / f"{question}_{name}"
    return ROOT / "benchmarks" / question / "results" / name


def slug(text: str) -> str:
    """Lower-case words with hyphens between them."""
    return "-".join(re.findall(r"[a-z0-9.]+", text.lower()))


def rows_so_far(file: Path) -> list[Row]:
    """Of an earlier run that is to be continued; none where there is no file."""
    return read(file)["rows"] if file.exists() else []


def read(file: Path) -> Record:
    """Raise ValueError, with the file's name, where it holds no record."""
    try:
        record: Record = json.loads(file.read_text("utf-8"))
        check(record)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from error
    return record


def rows_by(nested: dict[str, Any], *names: str) -> list[Row]:
    """Rows of nested dictionaries: `names` are columns for the keys of the outer ones.

    What is nested below them becomes columns with a point: {"rate": {"ours": 1}} is "rate.ours".
    """
    if not names:
        return [flat(nested)]
    return [{names[0]: key, **row} for key, value in nested.items()
            for row in rows_by(value, *names[1:])]  # fmt: skip


def flat(row: dict[str, Any], before: str = "") -> Row:
    found: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


def machine(on_gpu: bool = False) -> str:
    """What a machine's figures hang on: the GPU, or cores, instruction set and last-level cache."""
    import torch

    if on_gpu:
        return str(torch.cuda.get_device_name())
    capability = torch.backends.cpu.get_cpu_capability()
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    size = f", {int(cache.read_text().strip()[:-1]) // 1024} MB of cache" if cache.exists() else ""
    return f"{os.cpu_count()} cores, {capability}{size}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changes = "+changes" if git("status", "--porcelain", "--", "*.py", "*.cpp") else ""
        return git("rev-parse", "--short=7", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
