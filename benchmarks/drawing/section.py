"""What docs/benchmarks.md says about drawing."""

from benchmarks.common.record import ROOT, Row
from benchmarks.common.tables import newest, one, percent, pick, source, table

SHEET = ROOT / "docs/pictures/unseen-combinations.png"
"""By `--unseen-sheet`."""


def section() -> str:
    return f"{_codec()}\n\n{_model()}"


def _codec() -> str:
    record = newest("drawing.codec")
    settings = record["settings"]
    loops = len(record["rows"][0]["psnr_1_step_by_loop"])
    heads = ["pictures", *(f"1 step, {loop + 1} loop{'s' * (loop > 0)}" for loop in range(loops)),
             "8 steps", "codes used", "linear, not quantised"]  # fmt: skip
    lines = [
        [
            row["part"],
            *(f"{value:.2f}" for value in row["psnr_1_step_by_loop"]),
            f"{row['psnr_8_steps']:.2f}",
            percent(row["codes_used"]),
            f"{row['linear_psnr']:.2f}",
        ]
        for row in record["rows"]
    ]
    minutes = settings["trained_seconds"] / 60
    return f"""\
## What does a codec of pictures keep?

Emoji of 48 x 48 pixels as {settings["codes_a_picture"]} codes of {settings["codes"]:,},
{settings["bits_a_picture"]:.0f} bits a picture, by a codec of {settings["parameters"]:,} parameters
that was trained {minutes:.0f} minutes on a share of one busy core. PSNR in decibels on emoji that
it never saw (aim: 20.5 in one step, with 80 % of the codes used). The control is the best linear
codec of the same four numbers a patch, as floats that are not quantised. Eight steps of diffusion
are sharper and therefore farther from the picture, pixel by pixel.

{table(heads, lines)}

{source(record)}"""


def _model() -> str:
    record = newest("drawing.run")
    rows, settings = record["rows"], record["settings"]
    named = pick(rows, part="names")
    lines = [
        [
            str(row["loops"]),
            percent(row["ranked_first"]),
            percent(row["ranked_first_shuffled"]),
            percent(row["copies"]),
            f"{row['between_seeds_db']:.1f}",
        ]
        for row in named
    ]
    apart = one(rows, part="distance")
    heads = ["loops", "name first of ten", "under another's name", "copies", "dB between seeds"]
    return f"""\
## What does the bundled model draw?

Emoji of names that it learned in several styles, drawn in the style of {settings["style"]} with
guidance {settings["guidance"]:g} and {settings["draw_steps"]} steps. The judge is the bundled
picture model, which never met it: the name is first of ten for
{percent(named[0]["ranked_first_real"])} of the real pictures (aim: 60 % of that for drawings;
chance 10 %). A copy has three quarters of a training picture's codes in their places (aim: at most
20 %).

{table(heads, lines)}

The Frechet distance of the judge's mean states, of {apart["pictures"]} drawings to the real
pictures of their names, is {apart["drawn"]:.1f}. Of the same pictures through the codec it is
{apart["through_the_codec"]:.1f}, and of the pictures blurred as far from the real ones as the
codec leaves them ({apart["codec_db"]:.1f} dB) {apart["blurred"]:.1f}, which was the aim. Loops past
the first make drawings worse.

{_unseen(rows)}{_places(rows)}{source(record)}"""


def _unseen(rows: list[Row]) -> str:
    found = pick(rows, part="unseen combinations")
    if not found:
        return ""
    keys = ("ranked_first", "ranked_first_seen", "ranked_first_shuffled")
    lines = [[str(row["loops"]), *(percent(row[key]) for key in keys)] for row in found]
    heads = ["loops", "in the unseen style", "in Noto's style", "under another's name"]
    sheet = f"""\
From above, a combination in each column: Noto's picture, drawn in Noto's style, which was seen, and
drawn three times in the unseen one.

![Drawings of unseen combinations]({SHEET.relative_to(ROOT / "docs").as_posix()})

"""
    return f"""\
{found[0]["combinations"]} names in a style that has no picture of them, so that the model never
saw the two together. How often the judge puts the name first of ten, beside the same names as it
saw them, in Noto's style (Noto's own pictures: {percent(found[0]["ranked_first_real"])}):

{table(heads, lines)}

{sheet if SHEET.exists() else ""}"""


def _places(rows: list[Row]) -> str:
    found = pick(rows, part="places")
    if not found:
        return ""
    lines = [
        [
            str(row["row"] + 1),
            *(f"{n:.1f}, {percent(sure)}" for n, sure in zip(row["loops"], row["confidence"])),
        ]
        for row in found
    ]
    columns = [f"column {column + 1}" for column in range(len(found[0]["loops"]))]
    return f"""\
By the place of a code, where each stops by the model's own exit, its mean loops and its mean
confidence:

{table(["row", *columns], lines)}

"""
