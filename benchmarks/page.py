"""Writes docs/benchmarks.md from the newest records.

python -m benchmarks.page            # writes the page
python -m benchmarks.page --check    # fails where the page or a record is not up to date
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from importlib import import_module

from benchmarks.common.record import ROOT
from benchmarks.common.tables import all_records

PAGE = ROOT / "docs" / "benchmarks.md"
QUESTIONS = (
    "p_hop", "depth_pays", "depth", "recipe", "portable", "exits", "decode_speed", "batches",
    "speculation", "kv_cache", "memory", "retrofit", "serving", "start_time", "train_speed",
    "scale", "ternary", "finetuning", "pictures", "sound", "video", "drawing", "speaking",
    "tokenizing", "mutation", "reliability",
)  # fmt: skip
INTRODUCTION = """\
# Benchmarks

<!-- Written by `python -m benchmarks.page` from the records under benchmarks/. Do not edit. -->

Each section answers one question with the newest measurement, and names the command, machine, date
and commit behind it. Results that fall short stay in view. Run the commands in the root of a clone,
where `pip install -e '.[dev]'` has been done; `make bench` runs a short form of the CPU ones.

Machines differ and are noisy: compare the ratios of one run rather than rates of two runs.
`benchmarks/notebook/` holds the dated notes with the details and what was tried in vain."""


def page() -> str:
    sections = [import_module(f"benchmarks.{name}.section").section() for name in QUESTIONS]
    paragraphs = "\n\n".join([INTRODUCTION, *sections]).split("\n\n")
    return "\n\n".join(map(_wrapped, paragraphs)) + "\n"


def _wrapped(paragraph: str) -> str:
    """Prose in lines of one width, whatever figures stand in it; the rest as it is."""
    if paragraph.startswith(("#", "|", "-", "<")):
        return paragraph
    return textwrap.fill(paragraph, 100, break_long_words=False, break_on_hyphens=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Write nothing, only compare.")
    check = parser.parse_args().check
    all_records()
    text = page()
    if not check:
        PAGE.write_text(text, "utf-8")
    elif not PAGE.exists() or PAGE.read_text("utf-8") != text:
        print(f"{PAGE} is out of date: run `python -m benchmarks.page`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
