"""What docs/benchmarks.md says about the KV cache."""

from benchmarks.common.tables import newest, pick, source, table


def section() -> str:
    record = newest("kv_cache.run")
    deep = pick(record["rows"], part="quality", depth=10)
    own = pick(record["rows"], part="quality", depth="auto")
    quality = [
        [f"`{a['policy']}`", a["type"], a["bytes_per_token"],
         *(f"{100 * row[f'{text}.change']:+.2f} %" for row in (a, b) for text in ("prose", "hops"))]
        for a, b in zip(deep, own)
    ]  # fmt: skip
    sizes = [
        [f"`{row['policy']}`", row["type"], f"{row['bytes_per_token']:,}",
         f"{row['gigabytes_at_32k']:.2f}"]
        for row in pick(record["rows"], part="size", loops=10)
    ]  # fmt: skip
    (long,) = pick(record["rows"], part="context")
    heads = ["policy", "type", "bytes a token", "prose, ten loops", "hop lines, ten loops",
             "prose, own exit", "hop lines, own exit"]  # fmt: skip
    return f"""\
## How small can the KV cache be?

`last` keeps one loop's keys and values instead of all loops'. Change of the loss in real decoding
against the full cache in float32, bundled model; few texts, so that differences below half a per
cent are noise:

{table(heads, quality)}

`small` at ten loops, and what a context of 32,768 tokens takes:

{table(["policy", "type", "bytes a token", "GB"], sizes)}

A prompt of that length took {long["prompt_seconds"]:.0f} s by `last` and int8 at two loops, and
then {long["seconds_a_token"]:.2f} s a token: a rounded cache saves memory, not time.

{source(record)}"""
