"""What docs/benchmarks.md says about loops in a pretrained model."""

from benchmarks.common.tables import newest, one, percent, pick, source, table


def section() -> str:
    record = newest("retrofit.run")
    rows, settings = record["rows"], record["settings"]
    lines = []
    for text in pick(rows, part="text"):
        arm, loops = text["arm"], text["loops"]
        right = [
            percent(one(rows, part="hops", arm=arm, loops=loops, hops=hops)["right"])
            for hops in settings["hops"]
        ]
        lines.append([arm, loops, *right, f"{text['loss']:.3f}"])
    looped, control = (one(rows, part="training", arm=arm) for arm in ("looped", "control"))
    heads = ["arm", "loops", *(f"{n} hop{'s' * (n > 1)}" for n in settings["hops"]), "other text"]
    return f"""\
## Do loops pay in a pretrained model?

SmolLM2-135M with a core of its own layers, and adapters of rank {settings["rank"]} on them, after
{looped["steps"]} steps of {settings["batch"]} chains of look-ups in plain English; the control is
trained without loops, {control["steps"]} steps at the same FLOPs. Held-out questions
({settings["questions"]} of each kind) whose answer's first token is the likeliest one, and nats a
token on *Moby Dick*, of which the adapters saw nothing (aims: the second loop brings 10 points at
the most hops, and other text costs at most 0.5 % more than the control's).

{table(heads, lines)}

So few steps on one processor show no gain over the control: what the second loop brings within the
looped model, the control has in one.

{source(record)}"""
