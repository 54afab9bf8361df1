"""What docs/benchmarks.md says about serving."""

from benchmarks.common.record import Record
from benchmarks.common.tables import (
    all_records,
    newest,
    one,
    percent,
    records,
    source,
    table,
)


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
{source(soak)}
{beside_llama()}
{exits()}""".rstrip()


def exits() -> str:
    """Nothing where no trained model has been measured yet."""
    found = [record for record in all_records() if record["benchmark"] == "serving.exits"]
    if not found:
        return ""
    lines = []
    for record in found:
        [row] = record["rows"]
        lines.append(
            [
                record["variant"],
                f"`{row['rule']}`",
                f"{row['exit.mean_loops']:.2f}",
                row["smallest_equal_depth"],
                percent(row["loss_above_full_depth"], 2),
                f"{row['exit.tokens_per_second']:.0f}",
                f"{row['exit_against_fixed.rate']:.2f}",
                f"{row['exit_against_fixed.cpu']:.2f}",
                f"{row['exit_against_full_depth.rate']:.2f}",
            ]
        )
    heads = [
        "model", "rule", "mean loops", "fixed depth", "loss above full depth", "tokens/s",
        "to the fixed depth", "by processor time", "to full depth",
    ]  # fmt: skip
    settings = found[0]["settings"]
    return f"""
## What do exits bring to a server's streams?

{settings["streams"]} held-out texts at once, decoded by the engine with the model's stored exit and
at fixed depths; ratios of tokens a second to the smallest fixed depth within 0.5 % of full depth's
loss (aim: 1.3), and to full depth. `speeches` is `exits-wide` of `benchmarks.depth_pays`, loop t
counting t to the 1.25, with the exit of `inspect-loops --calibrate --target-loss-increase 0.5%`.

{table(heads, lines)}

The aim is missed: tokens take fewer loops, and no less time.

{source(*found)}"""


def beside_llama() -> str:
    """Nothing where no machine has compared the two yet."""
    found = records("serving.peer")
    return _beside(found[0]) if found else ""


def _beside(record: Record) -> str:
    lines = []
    for row in record["rows"]:
        rates = [f"{row[f'tokens_per_second.{name}']:.0f}" for name in ("looptx", "llama.cpp")]
        waits = [f"{row[f'first_token_p95.{name}']:.2f}" for name in ("looptx", "llama.cpp")]
        lines.append(
            [
                row["weights"],
                *rates,
                f"{row['ratio']:.2f}",
                *waits,
                f"{row['first_token_ratio']:.2f}",
            ]
        )
    heads = [
        "weights", "tokens/s", "llama-server's", "ratio", "first token, p95 s", "llama-server's",
        "ratio",
    ]  # fmt: skip
    settings = record["settings"]
    return f"""
## How fast does it serve, beside llama.cpp's server?

{settings["streams"]} streams at once over HTTP, greedy, {settings["new"]} new tokens after 8, at
full depth: `small` at two loops, and in `llama-server` a Llama of the same widths, vocabulary and
12 layers, with weights of the same type (int8: its q8_0). Both alternate on the same
{settings["threads"]} cores, which the client shares. Aims: 1.3 times its tokens in float32 and
bf16, as many in int8. The first token is that of {settings["streams"]} prompts of 256 tokens which
arrive together; aim: at most 1.5 times its wait.

{table(heads, lines)}

{source(record)}"""
