"""What docs/benchmarks.md says about serving."""

from benchmarks.common.tables import newest, source, table


def section() -> str:
    record, soak = newest("serving.run"), newest("serving.soak")
    lines = [
        [row["model"], f"{row['engine_ms_a_token']:.2f}", f"{row['server_ms_a_token']:.2f}",
         f"{100 * row['http_share_of_engine']:.0f} %"]
        for row in record["rows"]
    ]  # fmt: skip
    heads = ["model", "engine, ms a token", "server, ms a token", "HTTP's part of the engine's"]
    [row] = soak["rows"]
    return f"""\
## What does serving over HTTP cost?

Processor time of one thread, 16 streams at once, the client left out (aim for `small`: at most
10 %). HTTP takes the same time for each token, whatever the model, so that only a model as small
as the bundled one feels it.

{table(heads, lines)}

A soak of {row["done"] + row["cancelled"]:,} requests on 8 rows, {row["cancelled"]:,} of them
cancelled at random: {row["failed"]} failed, {row["different"]} got another text than the first of
their kind, {row["running"] + row["waiting"]:.0f} were left, and the memory grew by
{100 * row["memory_growth"]:.1f} % after the first 400.

{source(record)}
{source(soak)}"""
