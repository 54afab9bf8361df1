"""What docs/benchmarks.md says about hearing."""

from benchmarks.common.tables import newest, one, percent, pick, source, table

PERSON = "a person"


def section() -> str:
    record, telephone = newest("sound.run"), newest("sound.run", "telephone")
    rows = record["rows"]
    lines = []
    for part, what in (("digits", "digits, by all voices"), ("asterisk", "the telephone")):
        by_depth = [row for row in pick(rows, part=part) if "loops" in row]
        controls = [row for row in pick(rows, part=part) if "control" in row]
        lines.append([
            what,
            *(percent(row["word_error_rate"]) for row in by_depth),
            *(percent(row["word_error_rate"]) for row in controls),
        ])  # fmt: skip
    depths = [str(row["loops"]) for row in pick(rows, part="digits") if "loops" in row]
    names = [row["control"] for row in pick(rows, part="digits") if "control" in row]
    voices = [row for row in pick(rows, part="digits") if "voice" in row]
    synthetic = [row for row in voices if row["voice"] != PERSON]
    worst = max(row["word_error_rate"] for row in synthetic)
    mean = sum(row["word_error_rate"] for row in synthetic) / len(synthetic)
    auto = one(rows, part="digits", loops="auto")
    others, alone, raw = (
        pick(rows, part="words", less=less) for less in ("other sounds", "no sound", "nothing")
    )
    shuffled = one(rows, part="words", control="frames shuffled")
    heard = pick(telephone["rows"], part="asterisk")
    best = one(heard, loops="auto")["word_error_rate"]
    silent = one(heard, control="silence")["word_error_rate"]
    time = one(rows, part="time")
    quiet, noisy = (one(rows, part="nothing", kind=kind) for kind in ("silence", "noise"))
    each = table(
        ["voice", "word error rate"],
        [[row["voice"], percent(row["word_error_rate"])] for row in voices],
    )
    begin, end = auto.get("loops_begin", 0.0), auto.get("loops_end", 0.0)
    return f"""\
## What does the bundled speech model hear?

Strings of five digits, by synthetic voices that it never heard: {percent(mean)} of the words wrong
in the mean, {percent(worst)} with the worst voice (aim 25 %, later 5 %). Words wrong by depth, and
of the controls, by which nothing can be heard (90 % and more is right):

{table(["", *(f"loops: {depth}" for depth in depths), *names], lines)}

{each}

The person says single digits, put one after another, and speaks on the telephone: real recordings,
of which nothing was trained on; what the bundled model writes of the telephone is guessed. A model
that learned from fourteen minutes of her other recordings (`benchmarks/sound/telephone.yaml`) gets
{percent(best)} of the words wrong (aim 45 %; {percent(silent)} beside silence): it has her
sentences by heart and writes the nearest one, but does not spell words that it never heard. Of 72
single words by another person, ranked by log p(word given sound) less log p(word), the right one
is the first in {percent(others[0]["first"])} of the cases after one loop and in
{percent(others[-1]["first"])} after {others[-1]["loops"]} (aim 50 %, chance 1.4 %). There p(word)
is the mean beside all recordings; as a text alone, of which the model has learned little, it leaves
{percent(alone[0]["first"])}, and without it {percent(raw[0]["first"])} are right. With frames
shuffled it is {percent(shuffled["first"], 1)}. Loops past the first
bring little here, and the deepest make it worse. Silence gives an empty text in
{percent(quiet["empty"])} of the cases and noise in {percent(noisy["empty"])}. Words begin after
{begin:.1f} loops, and the text ends after {end:.1f}, by the model's own rule. One second of sound
takes {time["real_time_factor"]:.2f} s (aim 0.1), on a machine that other programs shared, and
{time["processor_time_factor"]:.2f} s of processor time.

{source(record)}

{source(telephone)}"""
