"""What docs/benchmarks.md says about when loops pay."""

from __future__ import annotations

import statistics

from benchmarks.common.record import Record, Row
from benchmarks.common.tables import pick, records, source, table
from benchmarks.depth.power import fit

QUESTION = """\
## When do loops pay?

Small models, one core, equal FLOPs with the products with the vocabulary included; `seconds` are of
the process. Bits per byte on held-out text; lower is better; one value for each seed."""


def reached(row: Row) -> float:
    value: float = row["bits_per_byte_by_loop"][-1]
    return value


def by_seed(rows: list[Row]) -> str:
    return ", ".join(f"{reached(row):.3f}" for row in sorted(rows, key=lambda row: row["seed"]))


def against(rows: list[Row], other: list[Row]) -> str:
    """By how much these are above others of the same seeds: the mean, and its 95 % interval."""
    theirs = {row["seed"]: reached(row) for row in other}
    changes = [100 * (reached(r) / theirs[r["seed"]] - 1) for r in rows if r["seed"] in theirs]
    if len(changes) < 3:
        return f"{statistics.mean(changes):+.1f} %"
    within = 4.303 * statistics.stdev(changes) / len(changes) ** 0.5  # Student's t for three seeds
    return f"{statistics.mean(changes):+.1f} ± {within:.1f} %"


def limited(record: Record) -> str:
    rows, lines = record["rows"], []
    for epochs in dict.fromkeys(row["epochs_of_reference"] for row in rows):
        plain = best(rows, "plain", epochs)
        for name in ("plain", "looped"):
            chosen, tried = (
                best(rows, name, epochs),
                pick(rows, name=name, epochs_of_reference=epochs),
            )
            first = chosen[0]
            lines.append([
                epochs, name,
                f"width {first['width']}, {first['blocks']} x {first['loops']}, dropout "
                f"{first['dropout']}, decay {first['weight_decay']}",
                len({(str(r["shape"]), str(r["regular"])) for r in tried}),
                f"{statistics.mean(r['epochs'] for r in chosen):.0f}", f"{first['flops']:.1e}",
                by_seed(chosen), "" if name == "plain" else against(chosen, plain),
            ])  # fmt: skip
    heads = ["epochs", "model", "best of the search", "tried", "own epochs", "FLOPs",
             "bits per byte", "against plain"]  # fmt: skip
    return f"""\
**Where data is limited**: every tenth chapter of *Moby Dick*, read 10 and 30 times by the first
looped model; all get its FLOPs. Shape, dropout and weight decay are searched for each side alike,
on the held-out text of the first seed. `1 x 3` is one block run three times.

{table(heads, lines)}"""


def best(rows: list[Row], name: str, epochs: int) -> list[Row]:
    """The runs of the setting that the search chose: the one with most seeds."""
    found = pick(rows, name=name, epochs_of_reference=epochs)
    same = [pick(found, shape=row["shape"], regular=row["regular"]) for row in found]
    return max(same, key=lambda some: (len(some), -reached(some[0])))


def schedules(record: Record) -> str:
    rows, lines = record["rows"], []
    first = pick(rows, name="fixed at 4")
    for name in dict.fromkeys(row["name"] for row in rows):
        for equal in ("FLOPs", "seconds"):
            if some := pick(rows, name=name, equal=equal):
                rates = [row["seconds"] / row["flops"] for row in some]
                usual = [row["seconds"] / row["flops"] for row in first]
                cost = statistics.mean(rates) / statistics.mean(usual) - 1
                lines.append([
                    name, equal, f"{some[0]['tokens'] / 1e6:.2f}M", f"{some[0]['mean_loops']:.1f}",
                    f"{statistics.mean(row['seconds'] for row in some):.0f}", by_seed(some),
                    "" if name == "fixed at 4" else against(some, first), f"{100 * cost:+.0f} %",
                ])  # fmt: skip
    heads = ["model", "equal", "tokens", "mean loops", "seconds", "bits per byte",
             "against fixed depth", "seconds a FLOP"]  # fmt: skip
    return f"""\
**Schedules**, on State of the Union speeches: one block of width 64. Depths are drawn from 1 to 4;
with `grow` they rise over the first half. Runs went one after another, and the seconds of equal
ones differ by up to a third: the next table has the clock in turns.

{table(heads, lines)}"""


def clock(record: Record) -> str:
    lines = [
        [
            row["name"], row["kernels"], row["mean_loops"], row["milliseconds"],
            f"{100 * (row['against_fixed'] - 1):+.0f} %",
        ]
        for row in record["rows"]
    ]  # fmt: skip
    heads = ["depth", "kernels", "mean loops", "ms a step", "seconds a FLOP"]
    return f"""\
**What do drawn depths cost on the clock?** Steps of the same model and text, in turns; the last
column is against a fixed depth of 4, read out once. Fixed depths of 1 and 2 tell what a shallower
step costs without any drawing.

{table(heads, lines)}

{source(record)}"""


def injections(record: Record, base: Record) -> str:
    usual, rows = pick(base["rows"], name="fixed at 4", equal="FLOPs"), record["rows"]
    lines = [["decay", by_seed(usual), "", f"{statistics.mean(r['seconds'] for r in usual):.0f}"]]
    for kind in dict.fromkeys(row["name"] for row in rows):
        some = pick(rows, name=kind)
        seconds = statistics.mean(row["seconds"] for row in some)
        lines.append([kind, by_seed(some), against(some, usual), f"{seconds:.0f}"])
    heads = ["injection", "bits per byte", "against decay", "seconds"]
    return f"""\
**Injections**, on the same text for the same FLOPs, four loops at every step:

{table(heads, lines)}"""


def iso_depth(record: Record) -> str:
    rows, lines = record["rows"], []
    once = pick(rows, loops=1)
    for kind in ("decay", "streams"):
        some = [*once, *(row for row in pick(rows, name=kind) if row["loops"] > 1)]
        parameters = [row["blocks"] * 13 * row["width"] ** 2 for row in some]
        try:
            found = fit([row["loops"] for row in some], parameters, [reached(row) for row in some])
            power = f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
            residual = f"{found.residual:.3f}"
        except ValueError as error:
            power, residual = f"none: {error}", ""
        means = [
            f"{statistics.mean(reached(row) for row in some if row['loops'] == loops):.3f}"
            for loops in (1, 2, 3, 6)
        ]
        lines.append([kind, power, residual, *means])
    heads = ["injection", "power, 95 %", "residual", "6 x 1", "3 x 2", "2 x 3", "1 x 6"]
    widths = ", ".join(map(str, sorted({row["width"] for row in rows})))
    return f"""\
**What is a loop worth in layers?** Six blocks deep, as `blocks x loops`, at widths {widths} and
equal tokens. The power is that of arXiv 2604.21106: with 1 a loop is as good as a layer of its own,
with 0 it is worth nothing. They report 0.46, and 0.65 with hyper-connections, at a thousand times
the size. These models have seen few tokens for their parameters, which makes loops look better.

{table(heads, lines)}"""


def section() -> str:
    found = {part: records("depth.run", part)[:1]
             for part in ("limited", "schedules", "injections", "iso-depth")}  # fmt: skip
    parts = [QUESTION]
    parts += [limited(record) for record in found["limited"]]
    parts += [schedules(record) for record in found["schedules"]]
    parts += [clock(record) for record in records("depth.clock")[:1]]
    if found["schedules"]:
        parts += [injections(r, found["schedules"][0]) for r in found["injections"]]
    parts += [iso_depth(record) for record in found["iso-depth"]]
    used = [record for some in found.values() for record in some][:1]  # one command, four files
    return "\n\n".join(
        [
            *parts,
            source(*used)
            or "Not measured yet: `python -m benchmarks.depth.run` does, part by part.",
        ]
    )
