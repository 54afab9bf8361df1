"""What docs/benchmarks.md says about motion."""

from benchmarks.common.kinds import kinds_table
from benchmarks.common.tables import newest, one, percent, pick, source, table


def section() -> str:
    record = newest("video.run")
    rows, settings = record["rows"], record["settings"]
    views = dict.fromkeys(row["seen"] for row in pick(rows, part="motions"))
    lines = []
    for view in views:
        row = one(rows, part="motions", seen=view, motion="all")
        pairs, eight = row["pairs_right_by_loop"], row["of_eight_right_by_loop"]
        loops = sorted({1, 2, 4, len(pairs)})
        lines.append([view, *(percent(pairs[n - 1]) for n in loops if n <= len(pairs)),
                      percent(eight[-1])])  # fmt: skip
    named = {
        row["seen"]: percent(row["of_ten_right_by_loop"][-1]) for row in pick(rows, part="names")
    }
    each = [
        [row["motion"], percent(row["pairs_right_by_loop"][-1])]
        for row in pick(rows, part="motions", seen="clips")
        if row["motion"] != "all"
    ]
    before, after = (
        one(rows, part="pictures", model=model) for model in ("of pictures", "of clips too")
    )
    heads = ["what is seen", *(f"pairs, {n} loop{'s' * (n > 1)}" for n in loops), "one of eight"]
    count = one(rows, part="motions", seen="clips", motion="all")["pairs"]
    return f"""\
## Does a looped model see motion?

Emoji that move, of names and in styles that were not trained on, after {settings["steps"]} steps
from the bundled picture model on. A pair is a clip and its reverse, whose frames are the same; it
is right where each of both captions costs less beside its own clip (aim 90 %, {count} pairs).
The controls see no order: one frame, and frames shuffled alike for both clips of a pair, can't be
right of both; guesses are right in a quarter of the pairs where each is shuffled by itself, and
in 12.5 % of one motion of eight.

{table(heads, lines)}

By motion, at the most loops:

{table(["motion and its reverse", "pairs right"], each)}

The right name of ten costs least beside {named["clip"]} of the clips and {named["one frame"]} of
single frames of them: names don't need time. Beside {after["pictures"]} still pictures in styles
that neither model learned from, a name costs {after["loss_by_loop"][-1]:.3f} nats a token, and
{before["loss_by_loop"][-1]:.3f} by the model of pictures that it began from (aim: within 0.5 %).

{kinds_table(rows, "seen", ["clips"])}{source(record)}"""
