"""What docs/benchmarks.md says about looping on plain text."""

from benchmarks.common.record import Row
from benchmarks.common.tables import newest, pick, source, table


def lines(rows: list[Row], names: dict[str, str]) -> list[list[str]]:
    """Name, seeds, tokens, FLOPs and bits per byte at full depth, by seed."""
    found = []
    for name, shown in names.items():
        runs = pick(rows, name=name)
        found.append([
            shown, f"{runs[0]['tokens'] / 1e6:.1f}M", f"{runs[0]['flops']:.2g}",
            ", ".join(f"{run['bits_per_byte_by_loop'][0]:.3f}" for run in runs),
            ", ".join(f"{run['bits_per_byte_by_loop'][-1]:.3f}" for run in runs),
        ])  # fmt: skip
    return found


def section() -> str:
    minutes, pays, narrow = (newest("depth_pays.run", v) for v in ("minutes", "pays", "narrow"))
    long, long_narrow = (newest("depth_pays.run", v) for v in ("long", "long-narrow"))
    heads = ["model", "tokens", "FLOPs", "bits per byte, one loop", "full depth"]
    once = {"one loop, equal tokens": "one block, once"}
    more = {"one loop, equal FLOPs": "one block, once, more text"}
    four = {"the same, retain 0.88": "one block, four loops"}
    layers = {"4 layers with a norm on the embedding": "four layers"}
    names = list(dict.fromkeys(row["name"] for row in long_narrow["rows"]))
    drawn = {"looped, sampled": "looped, depths drawn", "looped, loss": "looped, depths by loss"}
    return f"""\
## Does looping help on plain text?

Only where the text is far more than the parameters can take in. Bits per byte on held-out State of
the Union speeches; lower is better; one value for each seed.

**It pays on the clock** for a block of 49,000 parameters on 18M tokens: four loops beat one at
equal FLOPs.

{table(heads, lines(narrow["rows"], four | more | once))}

**It does not pay at equal FLOPs** for wider blocks at small budgets, where the same block run once
on more text, or four different layers, do better:

{table(heads, lines(pays["rows"], once | four | more | layers))}

**In minutes it brings nothing**: with 0.8M tokens the looped models are behind one loop at equal
FLOPs.

{table(heads, lines(minutes["rows"], once | more | drawn))}

**Longer runs** (36M tokens). Loops that are all run at every step bring most, but such a model
cannot stop early. Where depths are drawn, one loop is nearly as good as four. Width 128, then
width 64:

{table(heads, lines(long["rows"], {n: n for n in dict.fromkeys(r["name"] for r in long["rows"])}))}

{table(heads, lines(long_narrow["rows"], {n: n for n in names}))}

{source(narrow, pays, minutes, long, long_narrow)}"""
