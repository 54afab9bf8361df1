"""What docs/benchmarks.md says about serving."""

from benchmarks.common.tables import newest, one, percent, source, table


def section() -> str:
    record, soak = newest("serving.run"), newest("serving.soak")
    lines = [
        [row["model"], f"{row['engine_ms_a_token']:.2f}", f"{row['server_ms_a_token']:.2f}"]
        for row in record["rows"]
    ]
    heads = ["model", "engine, ms a token", "server, ms a token"]
    bundled, small = (one(record["rows"], model=name) for name in ("bundled", "small"))
    http = bundled["server_ms_a_token"] - bundled["engine_ms_a_token"]
    [row] = soak["rows"]
    return f"""\
## What does serving over HTTP cost?

Processor time of one thread, 16 streams at once, the client left out. HTTP takes about the same for
each token, whatever the model: by the bundled one, whose own time is small enough to tell,
{http:.2f} ms. That is {percent(http / small["engine_ms_a_token"])} of what `small` takes (aim: at
most 10 %), and less than its own two figures differ by chance on this busy machine.

{table(heads, lines)}

A soak of {row["done"] + row["cancelled"]:,} requests on 8 rows, {row["cancelled"]:,} of them
cancelled at random: {row["failed"]} failed, {row["different"]} got another text than the first of
their kind, {row["running"] + row["waiting"]:.0f} were left, and the memory grew by
{100 * row["memory_growth"]:.1f} % after the first 400.

{source(record)}
{source(soak)}"""
