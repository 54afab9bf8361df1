"""What docs/benchmarks.md says about the training recipe."""

import statistics

from benchmarks.common.record import Row
from benchmarks.common.tables import percent, pick, records, source, table

BASE = "the defaults with retain 0.5"


def section() -> str:
    hops, text = records("recipe.run", "p-hop"), records("recipe.run", "text")
    on_hops = [row for record in hops for row in record["rows"]]
    on_text = [row for record in text for row in record["rows"]]

    def seeds(rows: list[Row], name: str) -> list[Row]:
        return sorted(pick(rows, name=name), key=lambda row: row["seed"])

    def bits(name: str) -> float:
        return statistics.mean(r["bits_per_byte_by_loop"][-1] for r in seeds(on_text, name))

    lines = []
    for name in dict.fromkeys([BASE, *(row["name"] for row in (*on_hops, *on_text))]):
        found, texts = seeds(on_hops, name), seeds(on_text, name)
        change = f"{100 * (bits(name) / bits(BASE) - 1):+.1f} %" if texts else ""
        lines.append([
            name, ", ".join(percent(r["accuracy_by_hops"][-1], 1) for r in found),
            ", ".join(f"{r['bits_per_byte_by_loop'][-1]:.3f}" for r in texts), change,
        ])  # fmt: skip
    heads = ["change", "p-hop, 4 hops, by seed", "text, bits per byte, by seed", "against the base"]
    return f"""\
## What is each part of the training recipe worth?

Each change is made alone and trained for the FLOPs of the base. `retain` 0.88, drawn depths, Muon,
the injection and its norm earn their place; most other differences are no larger than those
between seeds. On text the base runs every loop at every step: drawn depths win there because they
are cheaper, and then one loop is nearly as good as four.

{table(heads, lines)}

{source(*hops, *text)}"""
