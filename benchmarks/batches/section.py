"""What docs/benchmarks.md says about batches."""

from benchmarks.common.tables import newest, one, source, table


def section() -> str:
    record, weights = newest("batches.run"), newest("batches.weights")
    streams = sorted({row["streams"] for row in weights["rows"]})
    by_type = [
        [kind, *(f"{one(weights['rows'], streams=n, weights=kind)['tokens_per_cpu_second']:,.0f}"
                 for n in streams)]
        for kind in ("float32", "bf16", "int8")
    ]  # fmt: skip
    lines = [
        [row["model"], row["requests"],
         f"{row['core_positions_a_token.continuous']:.1f} against "
         f"{row['core_positions_a_token.static']:.1f}",
         f"{row['continuous.tokens_per_second']:,.0f}", f"{row['static.tokens_per_second']:,.0f}",
         f"{row['ratio']:.2f}"]
        for row in record["rows"]
    ]  # fmt: skip
    heads = ["model", "requests", "loops a token", "continuous, tokens a second", "static", "ratio"]
    return f"""\
## What does continuous batching over depth bring?

A row whose token exits makes room at once. Against a static batch that runs all ten loops for
every token, 16 rows, one thread (aim 1.5). The bundled model's loop is so small that the work done
once a token takes most of the time; `small` has random weights and exits by chance.

{table(heads, lines)}

Streams share each read of the weights. Tokens a second of processor time, `small` at two loops, one
thread of a busy machine, by the number of streams:

{table(["weights", *streams], by_type)}

{source(record, weights)}"""
