"""Unseen combinations: names in styles that have no picture of them, so that none was learned.

Each name was seen in other styles, Noto's among them. Beside the drawing in the unseen style stands
the one in Noto's, which was seen, and Noto's own picture.
"""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.drawing.judge import SEED, draw, ranked_first, sheet
from benchmarks.pictures.emoji import COLOURED, fetch_emoji, styled
from benchmarks.pictures.run import Captions
from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.engine import Engine

NAMES = 40
SEEN = "noto"
"""It has a picture of every name."""
_OTHERS = 3  # styles in which a name was seen, at least
_SEEDS, _SHOWN = 3, 12  # drawings of a combination, and combinations, on a sheet


class Combination(NamedTuple):
    """A name, and a style without a picture of it."""

    name: str
    style: str
    real: str
    """Noto's picture of the name."""


def combinations(count: int) -> list[Combination]:
    """So many, each of another name, in turn of every style that lacks some."""
    folder = fetch_emoji()
    records = [json.loads(line) for line in (folder / "all.jsonl").read_text("utf-8").splitlines()]
    seen: dict[str, dict[str, str]] = {}
    for record in records:
        if record["style"] in COLOURED and not record["unseen"]:
            seen.setdefault(record["text"], {})[record["style"]] = str(folder / record["image"])
    names = [n for n, styles in seen.items() if len(styles) >= _OTHERS and SEEN in styles]
    random.Random(SEED).shuffle(names)
    found: list[Combination] = []
    while len(found) < count:
        before = len(found)
        for style in COLOURED:
            lacks = next((name for name in names if style not in seen[name]), None)
            if lacks is not None and len(found) < count:
                names.remove(lacks)
                found.append(Combination(lacks, style, seen[lacks][SEEN]))
        if len(found) == before:
            break
    return sorted(found, key=lambda each: COLOURED.index(each.style))


def draw_combinations(
    engine: Engine, judge: Captions, count: int, options: GenerationOptions, file: Path | None
) -> dict[str, Any]:
    """How often the judge ranks the name of a drawing first of ten, in the unseen style, as seen,
    under another's name, and of real pictures. file: of a sheet of the first of each style."""
    chosen = combinations(count)
    names = [each.name for each in chosen]
    with tempfile.TemporaryDirectory() as scratch:

        def drawn(styles: list[str], seed: int) -> list[str]:
            prompts = [styled(name, style) for name, style in zip(names, styles)]
            places = []
            for number, result in enumerate(draw(engine, prompts, replace(options, seed=seed))):
                places.append(f"{scratch}/{styles[0]}-{number}-{seed}.png")
                Path(places[-1]).write_bytes(result.outputs[0].content)
            return places

        known = drawn([SEEN] * len(names), 0)
        own = [each.style for each in chosen]
        unseen = [drawn(own, seed) for seed in range(1 if file is None else _SEEDS)]
        if file is not None:
            step = max(1, len(chosen) // _SHOWN)
            rows = [
                (Path(each.real), [Path(known[n]), *(Path(some[n]) for some in unseen)])
                for n, each in list(enumerate(chosen))[::step][:_SHOWN]
            ]
            sheet(rows, file, across=True)
            shown = ", ".join(f"{each.name} ({each.style})" for each in chosen[::step][:_SHOWN])
            print(f"{file}: {shown}")
        return {
            "combinations": len(chosen),
            "ranked_first": ranked_first(judge, unseen[0], names),
            "ranked_first_seen": ranked_first(judge, known, names),
            "ranked_first_real": ranked_first(judge, [each.real for each in chosen], names),
            "ranked_first_shuffled": ranked_first(judge, unseen[0][1:] + unseen[0][:1], names),
        }
