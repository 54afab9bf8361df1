"""What docs/benchmarks.md says about drawing."""

from benchmarks.common.tables import newest, percent, source, table


def section() -> str:
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
