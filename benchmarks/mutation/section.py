"""What docs/benchmarks.md says about the tests."""

from benchmarks.common.tables import newest, pick, source, table


def section() -> str:
    record = newest("mutation.run")
    rows = record["rows"]
    survivors = pick(rows, result="survived")
    lines = []
    for file in dict.fromkeys(row["file"] for row in rows):
        own = pick(rows, file=file)
        lines.append([f"`{file}`", len(own), len(own) - len(pick(own, result="survived"))])
    left = [
        [f"`{row['file'].rsplit('/', 1)[-1]}`", _code(row["before"]), _code(row["after"]),
         row["reason"] or "no test notices it"]
        for row in survivors
    ]  # fmt: skip
    return f"""\
## Would a test notice a mistake?

A mutant is a change of one operator, number or name of the code. Each is run against the tests of
its own file alone, and is killed where one of them fails. Of {len(rows)} that a fixed seed drew,
{len(rows) - len(survivors)} were killed:

{table(["file", "mutants", "killed"], lines)}

The others, with the reason:

{table(["file", "line", "mutant", "why it survived"], left)}

{source(record)}"""


def _code(line: str) -> str:
    return f"`{line.split('  # ')[0]}`".replace("|", "\\|")
