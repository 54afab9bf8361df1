"""What docs/benchmarks.md says about tokenizing."""

from benchmarks.common.tables import newest, pick, source, table


def section() -> str:
    record = newest("tokenizing.run")
    memory = [
        [
            row["input"],
            f"{row['megabytes']:.0f}",
            f"{row['seconds']:.0f}",
            row["peak_rss_megabytes"],
        ]
        for row in pick(record["rows"], part="memory")
    ]
    texts = [
        [row["text"], f"{row['looptx_bytes_per_token']:.2f}", f"{row['gpt2_bytes_per_token']:.2f}"]
        for row in pick(record["rows"], part="bytes a token")
    ]
    return f"""\
## How much memory does `looptx tokenize` take?

{table(["input", "MB", "seconds, one thread", "peak memory, MB"], memory)}

Bytes a token; a vocabulary of 4,096 is shorter than GPT-2's and so its tokens are:

{table(["text", "looptx, 4,096 tokens", "GPT-2, 50,257 tokens"], texts)}

{source(record)}"""
