"""What docs/benchmarks.md says about the start."""

from benchmarks.common.tables import newest, source, table

AIMS = {"--help": "0.3", "generate": "4"}


def section() -> str:
    record = newest("start_time.run")
    lines = [[f"`looptx {row['looptx'].split(',')[0]}`" + ", kernel not built yet" *
              ("," in row["looptx"]), f"{row['seconds']:.2f}", AIMS.get(row["looptx"], "")]
             for row in record["rows"]]  # fmt: skip
    return f"""\
## How long is the wait for the first word?

Whole processes, files read before; `generate` is the bundled model's first token.

{table(["command", "seconds", "aim"], lines)}

{source(record)}"""
