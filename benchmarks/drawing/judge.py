"""Drawings and who judges them: a picture model that never met the model which draws."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from PIL import Image

from benchmarks.pictures.emoji import fetch_emoji
from benchmarks.pictures.run import Captions
from looptx_core.checkpoint.folder import load_model
from looptx_core.checkpoint.registry import bundled_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.engine import Engine, Generation, MediaPrompt

SEED = 0
JUDGE = "5b3a6fd39025e4999ef7fdfeebd4179f3324859287d23dba7056dce17a8414b7"
"""SHA-256 of the judge's weights."""


def judge_of_drawings() -> Captions:
    """The bundled picture model, if it is the one that judged before."""
    place = bundled_model("picture-model")
    found = hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest()
    if found != JUDGE:
        raise SystemExit(f"{place} has the hash {found[:12]} and not the judge's {JUDGE[:12]}")
    return Captions(load_model(place), fetch_emoji())


def draw(engine: Engine, names: list[str], options: GenerationOptions) -> list[Generation]:
    return engine.complete([MediaPrompt(name, write="image") for name in names], options)


def ranked_first(judge: Captions, pictures: list[str], names: list[str]) -> float:
    """How often the judge ranks the own name of a picture first among it and nine others."""
    choose, hits = random.Random(SEED), 0
    for picture, name in zip(pictures, names):
        others = choose.sample([n for n in names if n != name], 9)
        choices = [name, *others]
        seen = judge.ranked_by({"image": picture}, choices)[-1]
        alone = judge.ranked_by(None, choices)[-1]
        hits += int((alone - seen).argmax()) == 0
    return hits / len(pictures)


def sheet(
    rows: list[tuple[Path, list[Path]]], file: Path, side: int = 48, across: bool = False
) -> None:
    """Rows of a real picture and what was drawn; across: columns of these."""
    parts = [[real, *drawn] for real, drawn in rows]
    lines: list[tuple[Path, ...]] = list(zip(*parts)) if across else list(map(tuple, parts))
    columns = max(map(len, lines))
    whole = Image.new("RGB", (columns * (side + 4), len(lines) * (side + 4)), "grey")
    for row, line in enumerate(lines):
        for column, picture in enumerate(line):
            with Image.open(picture) as found:
                shown = Image.new("RGBA", found.size, "white")
                shown.alpha_composite(found.convert("RGBA"))
                whole.paste(
                    shown.convert("RGB").resize((side, side)),
                    (column * (side + 4) + 2, row * (side + 4) + 2),
                )
    whole.save(file)
