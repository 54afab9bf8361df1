"""What docs/benchmarks.md says about looping on plain text."""

from benchmarks.common.record import Record, Row
from benchmarks.common.tables import newest, pick, source, table

HEADS = ["model", "tokens", "FLOPs", "bits per byte, one loop", "two loops", "full depth"]
ONCE = {"one loop, equal tokens": "one block, once"}
MORE = {"one loop, equal FLOPs": "one block, once, more text"}
FOUR = {"the same, retain 0.88": "one block, four loops"}
LAYERS = {"4 layers with a norm on the embedding": "four layers"}
DRAWN = {"looped, sampled": "looped, depths drawn", "looped, loss": "looped, depths by the loss"}


def lines(rows: list[Row], names: dict[str, str]) -> list[list[str]]:
    """Name, tokens, FLOPs and bits per byte by seed, after one loop, two and all."""
    found = []
    for name, shown in names.items():
        runs = pick(rows, name=name)
        curves = [run["bits_per_byte_by_loop"] for run in runs]
        first, second, last = (
            ", ".join(f"{curve[at]:.3f}" for curve in curves if len(curve) > max(at, 0))
            for at in (0, 1, -1)
        )
        size = f"{runs[0]['tokens'] / 1e6:.1f}M", f"{runs[0]['flops']:.1e}"
        found.append([shown, *size, first, second, last])
    return found


def all_of(record: Record) -> str:
    names = dict.fromkeys(row["name"] for row in record["rows"])
    return table(HEADS, lines(record["rows"], {n: DRAWN.get(n, n) for n in names}))


def section() -> str:
    narrow, pays, minutes, larger, more, long, long_narrow, ten, exits, wide = found = [
        newest("depth_pays.run", variant)
        for variant in ("narrow", "pays", "minutes", "12M", "36M", "long", "long-narrow",
                        "long-ten", "exits", "exits-wide")
    ]  # fmt: skip
    on_gpu = [
        *lines(larger["rows"], ONCE | FOUR | LAYERS),
        *lines(more["rows"], dict.fromkeys(ONCE, "one block, once, more text")),
    ]
    return f"""\
## Does looping help on plain text?

Only where there is far more text than the parameters can take in. Bits per byte on held-out State
of the Union speeches; lower is better; one value for each seed.

**It pays on the clock** for a block of 49,000 parameters on 18M tokens: four loops beat one at
equal FLOPs.

{table(HEADS, lines(narrow["rows"], FOUR | MORE | ONCE))}

**It does not pay at equal FLOPs** for wider blocks at small budgets, where the same block run once
on more text, or four different layers, do better:

{table(HEADS, lines(pays["rows"], ONCE | FOUR | MORE | LAYERS))}

At a larger budget on a GPU the block that runs once on more text is level with four loops:

{table(HEADS, on_gpu)}

**In minutes it brings nothing**: with 0.8M tokens the looped models are behind one loop at equal
FLOPs.

{table(HEADS, lines(minutes["rows"], ONCE | MORE | DRAWN))}

**Longer runs** (36M tokens). Loops that are all run at every step bring most, but such a model
cannot stop early. Where depths are drawn, one loop is nearly as good as four, and with four loops
full depth may be worse than two. Width 128, then width 64:

{all_of(long)}

{all_of(long_narrow)}

With up to ten loops no depth is worse than a smaller one; deeper draws make depth worth more:

{all_of(ten)}

A model that may stop after any loop and still gains from depth comes from reading every loop, the
later ones with more weight. Width 64, then two blocks of width 256:

{all_of(exits)}

{all_of(wide)}

{source(*found)}"""
