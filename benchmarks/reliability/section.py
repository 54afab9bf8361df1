"""What docs/benchmarks.md says about spoilt inputs, kills and failing writes."""

import re

from benchmarks.common.record import Record, Row
from benchmarks.common.tables import one, pick, records, source, table

LIMITS = "an internal error, more than 10 s of processor time, a crash, or more than 2 GB"


def section() -> str:
    parts = {"fuzz": _inputs, "kills": _kills, "failures": _failures}
    found = {name: records(f"reliability.{name}")[:1] for name in parts}
    told = [parts[name](record) for name, own in found.items() for record in own]
    sources = source(*(record for own in found.values() for record in own))
    return "\n\n".join(["## Does a bad input, a kill or a full disk do harm?", *told, sources])


def _inputs(record: Record) -> str:
    rows, every = record["rows"], one(record["rows"], part="all")
    lines = []
    for row in pick(rows, part="areas"):
        told = sum(row.get(f"exit code {code}", 0) for code in (1, 2, 3, 4))
        used = row.get("exit code 0", 0)
        lines.append([row["area"], row["inputs"], used, told, row["inputs"] - used - told])
    found = pick(rows, part="findings")
    left = every.get("left", every["findings"])
    mended = "all are mended" if not left else f"{left} of the inputs still do so"
    told = (
        f"{every['findings']} did, of the {every['kinds']} kinds below; {mended}."
        if found
        else "None did."
    )
    kinds = table(
        ["what", "where", "inputs", "after mending"],
        [[row["sort"], _where(row), row["count"], row.get("left", row["count"])] for row in found],
    )
    return f"""\
{every["inputs"]:,} inputs, each spoilt in one place by a fixed seed, were given to the command that
reads it. A command must end with its result or with one line that names what is wrong, where, and
the remedy; {LIMITS} is a finding. {told}

{table(["area", "inputs", "used", "refused in one line", "findings"], lines)}

{kinds if found else ""}""".rstrip()


def _where(row: Row) -> str:
    """The place in the code, or the command."""
    place = re.match(
        r"(?:looptx_core|looptx_cli)/(\S+?):(\w+): .*?internal error, (\w+)", row["where"]
    )
    return f"`{place[1]}`, {place[3]}" if place else f"`{row['where'][:60]}`"


def _kills(record: Record) -> str:
    lines = [
        [row["workers"], row["kills"], row["equal"], ", ".join(row["wrong"]) or "nothing"]
        for row in record["rows"]
    ]
    return f"""\
A training of {record["settings"]["steps"]} steps was ended by SIGKILL at random moments and
resumed; every other time it was to replace a finished run. Weights and metrics must equal, bit for
bit, those of a training that ran through, and of checkpoints and the finished run nothing may be
lost.

{table(["workers", "kills", "equal to the whole", "wrong"], lines)}"""


def _failures(record: Record) -> str:
    lines = [
        [f"{row['call']}, {'and all after it' if row['lasting'] else 'once'}", row["calls"],
         row["tried"], row.get("went on", 0), row.get("said so", 0), row.get("wrong", 0)]
        for row in record["rows"]
    ]  # fmt: skip
    return f"""\
One write (ENOSPC), fsync or rename (EIO) of a training of {record["settings"]["steps"]} steps
failed. It must go on, or end with one line; what lay there must be whole; and the resumed training
must equal one without a failure bit for bit.

{table(["fails", "calls of a training", "tried", "went on", "said so", "wrong"], lines)}"""
