"""What docs/benchmarks.md says about decoding speed."""

from benchmarks.common.record import Record
from benchmarks.common.tables import newest, pick, records, source, table

BY_LOOPS = "effective depth 12, by loops"
WEIGHTS = ("float32", "bf16", "int8", "ternary")


def _against_peers(record: Record) -> str:
    def rate(row: dict, side: str) -> str:
        found = row.get(f"tokens_per_second.{side}")
        return f"{found:,.0f}" if found else ""

    def ratio(row: dict, side: str) -> str:
        found = row.get(f"ratio_to.{side}")
        return f"{found:.2f}" if found else ""

    lines = [
        [row["model"], row["weights"], rate(row, "looptx"), rate(row, "looptx, torch alone"),
         rate(row, "transformers"), rate(row, "llama.cpp"), ratio(row, "transformers"),
         ratio(row, "llama.cpp")]
        for row in record["rows"] if row["model"] != BY_LOOPS
    ]  # fmt: skip
    heads = ["model", "weights", "looptx", "torch alone", "transformers", "llama.cpp",
             "ratio to transformers", "to llama.cpp"]  # fmt: skip
    return table(heads, lines)


def section() -> str:
    found = records("decode_speed.run")
    on_cpu = [record for record in found if "cores" in record["machine"]["name"]]
    gpu = newest("decode_speed.run", machine="NVIDIA")
    ratios = [row["ratio_to.transformers"] for record in on_cpu for row in record["rows"]
              if "ratio_to.transformers" in row]  # fmt: skip
    of_llama = [row["ratio_to.llama.cpp"] for record in on_cpu for row in record["rows"]
                if "ratio_to.llama.cpp" in row]  # fmt: skip
    with_loops = next(r for r in on_cpu if pick(r["rows"], model=BY_LOOPS))
    loops = []
    for weights in WEIGHTS:
        rows = pick(with_loops["rows"], model=BY_LOOPS, weights=weights)
        loops.append([weights, *(f"{row['tokens_per_second']:.0f}" for row in rows)])
    tables = "\n\n".join(
        f"{record['machine']['name']}:\n\n{_against_peers(record)}" for record in on_cpu
    )
    return f"""\
## How fast is decoding?

On a CPU {min(ratios):.1f} to {max(ratios):.1f} times as fast as transformers and
{min(of_llama):.1f} to {max(of_llama):.1f} times as fast as llama.cpp (asked by its Python package,
a call a token), at the same depth, width and type of weights. Tokens a second, batch 1, full
depth. The aim of 3 times transformers is missed where the ratio is below 3.

{tables}

Where fewer blocks are looped more often, the block stays in the processor's cache. Tokens a second
of ten blocks of arithmetic as

{table(["weights", "10 blocks once", "5 twice", "2 five times", "1 ten times"], loops)}

On a GPU, by CUDA graphs, batch 1; transformers was not compiled with a static cache, which would
bring it nearer:

{_against_peers(gpu)}

{source(*on_cpu, gpu)}"""
