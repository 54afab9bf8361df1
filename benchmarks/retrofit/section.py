"""What docs/benchmarks.md says about loops in a pretrained model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.common.record import Record
from benchmarks.common.tables import newest, pick, records, source, table
from looptx_core.words import counted

SIDES = ("looptx", "transformers", "llama.cpp")
STUDENT = 4.303  # for a 95 % interval of the mean of three


def over_seeds(values: Sequence[float], scale: float, digits: int) -> str:
    """The mean of three with its 95 % interval, else each value."""
    if len(values) != 3:
        return ", ".join(f"{scale * value:.{digits}f}" for value in values)
    within = STUDENT * statistics.stdev(values) / len(values) ** 0.5
    mean = round(scale * statistics.mean(values), digits) + 0.0  # no minus before a zero
    return f"{mean:.{digits}f} ± {scale * within:.{digits}f}"


def answers(record: Record, layers: str) -> tuple[list[list[str]], list[int]]:
    """A line for each arm and number of loops, and the seeds."""
    rows, hops = pick(record["rows"], layers=layers), record["settings"]["hops"]
    lines = []
    kinds = dict.fromkeys((row["arm"], row["loops"]) for row in pick(rows, part="text"))
    for arm, loops in kinds:
        own = {"arm": arm, "loops": loops}
        right = [
            [row["right"] for row in pick(rows, part="hops", hops=count, **own)] for count in hops
        ]
        text = [row["loss"] for row in pick(rows, part="text", **own)]
        if arm == "base":  # the same for every seed
            right, text = [values[:1] for values in right], text[:1]
        lines.append([
            arm, str(loops), *(over_seeds(values, 100, 0) for values in right),
            over_seeds(text, 1, 3),
        ])  # fmt: skip
    return lines, sorted({row["seed"] for row in rows})


def differences(record: Record, layers: str) -> str:
    """What the second loop brings, and how one loop and both stand to the control."""
    rows, hops = pick(record["rows"], layers=layers), max(record["settings"]["hops"])

    def right(arm: str, loops: int) -> list[float]:
        found = pick(rows, part="hops", arm=arm, loops=loops, hops=hops)
        return [row["right"] for row in sorted(found, key=lambda row: row["seed"])]

    one, deep = right("looped", 1), right("looped", record["settings"]["max_loops"])
    control = right("control", 1)
    parts = (
        [b - a for a, b in zip(one, deep)], [a - b for a, b in zip(one, control)],
        [a - b for a, b in zip(deep, control)],
    )  # fmt: skip
    brought, first, whole = (over_seeds(values, 100, 0) for values in parts)
    text = [
        [r["loss"] for r in pick(rows, part="text", arm=arm, loops=loops)]
        for arm, loops in (("looped", record["settings"]["max_loops"]), ("control", 1))
    ]
    more = over_seeds([a / b - 1 for a, b in zip(*text)], 100, 1)
    return f"""\
Points at {hops} hops: by the later loops within the looped model {brought}; from the control, at
one loop {first}, at all {whole}. Its loss on other text differs from the control's by {more} %."""


def more_hops() -> str:
    found = records("retrofit.run", "hops-1-to-8")[:1]
    if not found:
        return ""
    settings, rows = found[0]["settings"], found[0]["rows"]
    heads = ["arm", "loops", *(f"{n} hop{'s' * (n > 1)}" for n in settings["hops"]), "other text"]
    steps = pick(rows, part="training", arm="control")[0]["steps"]
    cut = {row["arm"]: row for row in pick(rows, part="cut short")}
    return f"""\
**And with more hops, people and steps?** {settings["people"]} people, {settings["steps"]} steps of
{settings["batch"]} x {settings["seq_len"]} tokens (the control: {steps}), adapters on the core's
layers, one seed, on a GPU:

{table(heads, answers(found[0], "core")[0])}

The aim: 5 points ahead of the control at the most hops. Neither arm learns more than two hops
there, and loops after the second change nothing. With adapters on all layers the run was cut short:
the looped model's {cut["looped"]["steps"]} steps ended at {cut["looped"]["loss"][-1]:.2f} nats an
answer on held-out questions of all hops together ({cut["looped"]["loss"][0]:.2f} at one loop),
{cut["control"]["steps"]} of the control's at {cut["control"]["loss"][0]:.2f}: the loops lose.

{source(found[0])}"""


def speed() -> str:
    found = records("retrofit.training")[:1]
    if not found:
        return ""
    lines = [
        [r["side"], r["precision"], f"{r['tokens_per_cpu_second']:.0f}",
         f"{r['ratio_of_processor_time']:.2f}", f"{r['peak_gb']:.1f} GB"]
        for r in found[0]["rows"]
    ]  # fmt: skip
    settings = found[0]["settings"]
    return f"""\

**How fast, beside PEFT?** Steps of {settings["batch"]} x {settings["seq_len"]} tokens that all
count, LoRA of rank {settings["rank"]} on the core's layers, one loop, in turns; the ratio is that
of processor time to transformers with PEFT.

{table(["side", "precision", "tokens a CPU second", "ratio", "peak memory"], lines)}

{source(found[0])}"""


def decoding() -> str:
    found = records("retrofit.decoding")[:1]
    if not found:
        return ""
    lines = []
    for row in found[0]["rows"]:
        cells = [row.get(f"tokens_per_second.{side}") for side in SIDES]
        ratios = [row.get(f"ratio_to.{side}") for side in SIDES[1:]]
        lines.append([row["threads"], row["weights"], *(f"{x:,.1f}" if x else "" for x in cells),
                      *(f"{x:.2f}" if x else "" for x in ratios)])  # fmt: skip
    heads = ["threads", "weights", *SIDES, *(f"ratio to {side}" for side in SIDES[1:])]
    return f"""

**How fast does it decode?** Its first loop, {found[0]["what"]}; llama.cpp with BF16 and Q8_0
beside bf16 and int8. The aims: 1.5 times transformers, and no slower than llama.cpp.

{table(heads, lines)}

{source(found[0])}"""


def untrained() -> str:
    found = records("retrofit.untrained")[:1]
    if not found:
        return ""
    rows, settings = found[0]["rows"], found[0]["settings"]
    lines = [
        [own["scheme"], *(f"{row['more']:+.4f} ± {row['error']:.4f}" for row in (other, own))]
        for own, other in zip(pick(rows, half="report"), pick(rows, half="choose"))
        if own["scheme"] != "itself"
    ]
    nats = pick(rows, half="report", scheme="itself")[0]["nats"]
    halves = pick(rows, scheme="half steps, 2 loops")
    lower, upper = sorted(-100 * row["more"] / (row["nats"] - row["more"]) for row in halves)
    return f"""

**And without any training?** The change of the loss, {nats:.3f} nats a token, of the model itself
by later runs of its core, on windows of {settings["length"]} tokens of three kinds of text (the
novel, Python's documentation, ours), and the standard error of the difference.

{table(["scheme", "half of the windows", "the other half"], lines)}

Two loops of half steps lower it by {lower:.1f} to {upper:.1f} % for a fifth more layers, on one
half of the windows by less than the error; `convert --core` measures them and `--injection
half_steps` takes them. Everything else raises it on one half or on both.

{source(found[0])}"""


def exits() -> str:
    found = records("retrofit.exits")[:1]
    if not found:
        return ""
    lines = []
    for row in found[0]["rows"]:
        own = row["side"] == "exit"
        ratios = [f"{row[key]:.2f}" if own else "" for key in ("times_fewer_loops", "times_faster")]
        side = "exit" if own else f"{row['side']} loop{'s' * (row['side'] != '1')}"
        more = f"{100 * row['more']:+.2f} ± {100 * row['error']:.2f} %"
        lines.append([row["decoded"], side, f"{row['mean_loops']:.2f}",
                      f"{row['loops_of_names']:.2f}", f"{row['loss']:.4f}", more,
                      f"{row['seconds']:.1f}", *ratios])  # fmt: skip
    heads = ["decoded", "depth", "loops", "of names", "loss", "more", "seconds",
             "times fewer loops", "times faster"]  # fmt: skip
    settings = found[0]["settings"]
    return f"""

**What does the exit save on held-out answers?** An answer is a name and the end token, and both
count. The rule is the cheapest one that {settings["calibration"]:,} other questions, half of them
picking, show to be within 0.5 %. Beside it stands the smallest fixed depth within 0.5 % of the
deepest; *more* is what is lost beside the deepest, with its standard error over
{settings["texts"]} questions. The aim: 1.3 times fewer loops at a loss within 0.5 %, and faster.
Seconds are of whole texts, most of whose tokens are facts that are read at full depth.

{table(heads, lines)}

With the question read at full depth, whole answers reach the aim in loops and loss. The clock does
not show it: one token of each text stops early, and the machine was busy. All that stops is end
tokens, at no loss; every name runs both loops. Where the question is decoded with the exit too, the
loss is not shown to be kept: the rule is picked on answers to questions read at full depth.

Names alone do not reach the aim: the bound lets none of them stop.

{source(found[0])}"""


def section() -> str:
    record = newest("retrofit.run")
    settings, parts = record["settings"], []
    heads = ["arm", "loops", *(f"{n} hop{'s' * (n > 1)}" for n in settings["hops"]), "other text"]
    for layers in dict.fromkeys(row["layers"] for row in record["rows"]):
        lines, seeds = answers(record, layers)
        whose = "the core's" if layers == "core" else "all"
        intervals = ", the mean with its 95 % interval" if len(seeds) == 3 else ""
        parts.append(f"""\
**Adapters on {whose} layers**, {counted(len(seeds), "seed")}{intervals}:

{table(heads, lines)}

{differences(record, layers)}""")
    trained = pick(record["rows"], part="training")
    steps = {arm: pick(trained, arm=arm)[0]["steps"] for arm in ("looped", "control")}
    tables = "\n\n".join(parts)
    others = (more_hops(), untrained(), exits(), speed(), decoding())
    rest = "\n\n".join(part.strip() for part in others if part)
    return f"""\
## Do loops pay in a pretrained model?

SmolLM2-135M-Instruct with a core of its own layers, and adapters of rank {settings["rank"]}, after
{steps["looped"]} steps of {settings["batch"]} rows of chains of look-ups ("Ann's boss's boss is",
{settings["people"]} people); the control is trained without loops, {steps["control"]} steps at the
same FLOPs. Percent of held-out questions ({settings["questions"]} of each kind) whose answer is the
likeliest token, and nats a token on *Moby Dick*, of which the adapters saw nothing. The aims: later
loops bring 10 points at the most hops, one loop is at most 3 below the control, and other text
costs at most 0.5 % more than the control's.

{tables}

{source(record)}

{rest}"""
