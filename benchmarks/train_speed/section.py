"""What docs/benchmarks.md says about training speed."""

from benchmarks.common.record import Record
from benchmarks.common.tables import newest, one, percent, pick, records, source, table

LAST, PLAIN = "looptx, last loop only", "looptx, last loop only, plain"
ADAMW, MUON = "looptx, default recipe, AdamW", "looptx, default recipe"
SHAPES = {"small 4x512": "`small`, 4 x 512", "small 4x512 one thread": "`small`, 4 x 512",
          "small 8x256": "`small`, 8 x 256", "nano 32x128": "`nano`, 32 x 128"}  # fmt: skip


def _ratio(record: Record, side: str) -> str:
    rows = pick(record["rows"], side=side)
    return f"{rows[0]['ratio_of_processor_time']:.2f}" if rows else ""


def section() -> str:
    on_cpu = [(shape, record) for variant, shape in SHAPES.items()
              for record in records("train_speed.run", variant)
              if "cores" in record["machine"]["name"]]  # fmt: skip
    lines = []
    for shape, record in on_cpu:
        kept = one(record["rows"], side=LAST).get("ratio_to_transformers_with_freed_memory_kept")
        lines.append([shape, record["machine"]["name"], record["machine"]["threads"],
                      *(_ratio(record, side) for side in (LAST, PLAIN, ADAMW, MUON)),
                      f"{kept:.2f}" if kept else ""])  # fmt: skip
    heads = ["shape", "machine", "threads", "last loop, AdamW", "without fused kernels",
             "default recipe, AdamW", "default recipe (Muon)",
             "last loop, both keep freed memory"]  # fmt: skip
    last = {s: [float(_ratio(r, LAST)) for shape, r in on_cpu if shape.startswith(f"`{s}`")]
            for s in ("small", "nano")}  # fmt: skip
    variants = ("small 8x256", "small 32x1024 last", "small 32x1024")
    on_gpu = [record for variant in variants for record in records("train_speed.run", variant)
              if "NVIDIA" in record["machine"]["name"]]  # fmt: skip
    cards = []
    for record in on_gpu:
        for row in record["rows"]:
            beside = row.get("ratio_to_transformers_compiled")
            shape = f"{record['settings']['rows']} x {record['settings']['length']}"
            cards.append([shape, record["machine"]["name"], row["side"],
                          f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}",
                          f"{beside:.2f}" if beside else ""])  # fmt: skip
    mfu = newest("train_speed.gpu")
    large = [
        [row["loop"], row["attention"], "yes" if row["compiled"] else "no",
         f"{row['tokens_per_second']:,.0f}", percent(row["mfu"])]
        for row in mfu["rows"] if "mfu" in row
    ]  # fmt: skip
    parts = newest("train_speed.parts")
    sides = pick(parts["rows"], part="share of a step")
    shares = [
        [line, *(percent(side[line], 1) for side in sides)]
        for line in sides[0] if line not in ("part", "side")
    ]  # fmt: skip
    return f"""\
## How fast is training, against transformers?

On a CPU it depends on the machine. With the loss at the last loop and AdamW, `small` trains
{min(last["small"]):.2f} to {max(last["small"]):.2f} times as fast as transformers' Llama of the
same width and effective depth, and `nano` {min(last["nano"]):.2f} to {
        max(last["nano"]):.2f} times. On the worst machine, two cores with AVX-512 and two threads,
`small` is slower than transformers, the fused kernels make it slower still, and so does the
default recipe. The aims of 1.2 (`small`) and 1.5 (`nano`) are met on the best machine alone.
These records are from before a run tried each kernel on its machine and left those that lose to
plain torch; here all of them were on. Ratios of processor time in float32; above 1 looptx is
faster:

{table(heads, lines)}

{source(*(record for _, record in on_cpu))}

On a GPU in bf16, `small`. Compiled, looptx is faster than transformers as it comes, and
**transformers compiled too is ahead of it**:

{
        table(
            [
                "rows x length",
                "card",
                "side",
                "tokens a second",
                "ratio to transformers",
                "to it compiled",
            ],
            cards,
        )
    }

1.1B effective parameters (8 rows of 1,024 tokens) beside a plain torch loop, which has neither
documents nor drawn depths nor a confidence head; MFU is against 989 TFLOP/s:

{table(["loop", "attention", "compiled", "tokens a second", "MFU"], large)}

{source(*on_gpu, mfu)}

Where a step of `small` goes, on one thread: matrix products that both sides share take most of it,
so that no kernel can make it 1.5 times as fast in float32.

{table(["", *(side["side"] for side in sides)], shares)}

{source(parts)}"""
