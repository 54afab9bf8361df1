"""What docs/benchmarks.md says about pictures."""

from benchmarks.common.tables import newest, one, percent, source, table

FORMS = {
    "one_of_ten_unseen": "the bare name",
    "one_of_ten_unseen_with_kinds": "kind and name",
    "one_of_ten_unseen_with_annotations": "annotations",
    "one_of_ten_unseen_in_all_three_forms": "all three",
    "one_of_ten_unseen_in_a_style_trained_on": "the bare name, a style that was trained on",
}


def section() -> str:
    record = newest("pictures.run")
    rows = record["rows"]
    seen, unseen, cats, photographs = (
        one(rows, part=part) for part in ("seen_names", "unseen_names", "cats", "photographs")
    )
    columns = ("probability_by_loop", "over_no_picture_by_loop", "over_other_pictures_by_loop")
    lines = [
        [name, *(percent(one(rows, part=part)[column][-1]) for column in columns)]
        for part, name in FORMS.items()
    ]
    photos = [percent(photographs[f"one_of_ten.{column}"][-1]) for column in columns]
    lines.append(["photographs", *photos])
    styles = newest("pictures.styles", "bundled")
    named = [
        [row["style"], f"{row['common_right']} of {row['common']}", percent(row["names_right"])]
        for row in styles["rows"]
    ]
    heads = ["caption", "log p(caption given picture)", "less log p without a picture",
             "less log of the mean p over other pictures"]  # fmt: skip
    return f"""\
## What does the bundled picture model know?

Emoji, and nothing else: photographs are chance to it (10 %). In two styles that it never saw, the
right picture is worth {seen["difference"]:.2f} nats a token where the name was trained on and
{unseen["difference"]:.2f} where it was not; it says "cat" of {percent(cats["cat_said_of_cats"])}
of the cats and {percent(cats["cat_said_of_others"])} of the others. The right caption of ten,
names never seen (aim 50 %, missed by the bare name):

{table(heads, lines)}

What it names, greedily, in styles that no recipe was chosen by (OpenMoji, JoyPixels) and in the two
others; every name was trained on in other styles (aim 7 of 12 common names):

{table(["style", "common names", "other names, exact"], named)}

Loops do not help here: seen names cost {seen["loss_by_loop"][0]:.3f} nats a token after one loop
and {seen["loss_by_loop"][-1]:.3f} after ten.

{source(record, styles)}"""
