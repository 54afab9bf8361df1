"""What docs/benchmarks.md says about speaking."""

from benchmarks.common.kinds import kinds_table
from benchmarks.common.tables import newest, percent, pick, source, table


def section() -> str:
    return f"{_codec()}\n\n{_model()}"


def _codec() -> str:
    record = newest("speaking.codec")
    settings, rows = record["settings"], record["rows"]
    kinds = [(row["what"], row.get("steps"), row.get("loops")) for row in pick(rows, set="digits")]
    lines = []
    for what, steps, loops in kinds:
        name = what if steps is None else f"codec, {steps} step{'s' * (steps > 1)}, {loops} loops"
        where = {"what": what} if steps is None else {"what": what, "steps": steps, "loops": loops}
        found = [pick(rows, set=kind, **where) for kind in ("digits", "sentences")]
        lines.append([name, *(percent(r[0]["word_error_rate"]) if r else "" for r in found)])
    return f"""\
## What does a codec of speech keep?

One voice at {settings["bits_a_second"]:.0f} bits a second, by a codec of {settings["parameters"]:,}
parameters that was trained {settings["trained_seconds"] / 60:.0f} minutes on a share of one busy
core; its mels are off by {settings["mel_error_1_step"]:.1f} dB. Word error rates of pocketsphinx on
{settings["recordings"]} recordings of each kind that the codec never heard: digits by a grammar,
sentences by its own model of English (aim: at most 30 %). The voice is flite's, and the recordings
as spoken are the first line.

{table(["", "digits", "sentences"], lines)}

{source(record)}"""


def _model() -> str:
    record = newest("speaking.run")
    settings, rows = record["settings"], record["rows"]
    lines = [
        [
            row["set"],
            str(row["loops"]),
            percent(row["word_error_rate"]),
            f"{row['length_ratio']:.2f}",
            f"{row['seconds_a_second']:.1f}",
            str(row["unfinished"]),
        ]
        for row in rows
        if "word_error_rate" in row
    ]
    whole = [row for row in rows if "of_another_text" in row]
    controls = "; ".join(
        f"{row['set']}: {percent(row['of_another_text'])} against another text, "
        f"{percent(row['by_our_recogniser'])} by the bundled model that hears, which misses "
        f"{percent(row['recordings_by_our_recogniser'])} of the recordings"
        for row in whole
    )
    heads = ["texts", "loops", "word errors", "length to the recording's", "seconds a second",
             "unfinished"]  # fmt: skip
    return f"""\
## Is what a model says understood?

The bundled model that speaks, of {settings["parameters"] / 1e6:.1f} million parameters, with this
codec in bfloat16, trained for {settings["steps"]:,} steps in all, on {settings["texts"]} other
strings of five digits (aim: at most 10 % word errors) and as many other sentences of the same
words (aim: at most 45 %), as pocketsphinx hears them; temperature
{settings["temperature"]:g}, {settings["draw_steps"]} step of diffusion. Length is the median of the
ratios to the recording of the same text. At all loops, {controls}.

{table(heads, lines)}

{kinds_table(rows, "set", ["digits", "sentences"])}{source(record)}"""
