"""What a model draws from names: seen by a reader that never met it, copies, and how seeds differ.

    python -m benchmarks.drawing.run --model FOLDER [--names 40] [--style noto] [--guidance 2]
        [--sheet FILE] [--check]

Names were trained on in some style. The judge is the picture model that ships with the package,
kept by its hash: it ranks the name among ten, by what the picture adds to the name's probability.
Beside it stand real pictures of the same names, and the same drawings under another's name, which
is chance. `--sheet` writes all drawings beside a real picture. `--check` draws few pictures and
leaves no record.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.common.record import write
from benchmarks.pictures.emoji import TRAIN, fetch_emoji
from benchmarks.pictures.run import Captions
from looptx_core.checkpoint.folder import LoadedModel, load_model
from looptx_core.checkpoint.registry import bundled_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.engine import Engine, Generation, MediaPrompt
from looptx_core.media.codec.opened import opened_codec
from looptx_core.media.image.coded import read_patches
from looptx_core.training.codec import decibels, from_bytes

SEED = 0
COPY = 25.0
"""dB to the nearest training picture from which on a drawing counts as its copy."""
SEEDS = 4


def draw(engine: Engine, names: list[str], options: GenerationOptions) -> list[Generation]:
    return engine.complete([MediaPrompt(name, write="image") for name in names], options)


def ranked_first(judge: Captions, pictures: list[str], names: list[str]) -> float:
    """How often the judge ranks the own name of a picture first among it and nine others."""
    reconstruct, hits = random.Random(SEED), 0
    for picture, name in zip(pictures, names):
        others = reconstruct.sample([n for n in names if n != name], 9)
        choices = [name, *others]
        seen = judge.ranked_by({"image": picture}, choices)[-1]
        alone = judge.ranked_by(None, choices)[-1]
        hits += int((alone - seen).argmax()) == 0
    return hits / len(pictures)


def nearest(pictures: list[Path], known: Tensor, config: Any) -> list[float]:
    """The PSNR of each picture to the nearest of known ones, dB."""
    found = []
    for picture in pictures:
        own = from_bytes(read_patches(picture, config))
        errors = torch.cat([
            (from_bytes(some) - own).square().mean((1, 2)) for some in known.split(512)
        ])  # fmt: skip
        found.append(float(decibels(errors.min())))
    return found


def sheet(rows: list[tuple[Path, list[Path]]], file: Path, side: int = 48) -> None:
    """Rows of a real picture and what was drawn."""
    columns = 1 + max(len(drawn) for _, drawn in rows)
    whole = Image.new("RGB", (columns * (side + 4), len(rows) * (side + 4)), "grey")
    for row, (real, drawn) in enumerate(rows):
        for column, picture in enumerate([real, *drawn]):
            with Image.open(picture) as found:
                shown = Image.new("RGBA", found.size, "white")
                shown.alpha_composite(found.convert("RGBA"))
                whole.paste(
                    shown.convert("RGB").resize((side, side)),
                    (column * (side + 4) + 2, row * (side + 4) + 2),
                )
    whole.save(file)


def measure(
    loaded: LoadedModel, style: str, count: int, options: GenerationOptions, sheet_file: Path | None
) -> dict[str, Any]:
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit)
    folder = fetch_emoji()
    records = list(map(json.loads, (folder / "all.jsonl").read_text("utf-8").splitlines()))
    known = [r for r in records if not r["unseen"] and r["style"] in TRAIN]
    of_style = {r["text"]: r for r in known if r["style"] == style}
    names = random.Random(SEED).sample(sorted(of_style), count)
    judge = Captions(load_model(bundled_model("picture-model")), folder)
    real = [str(folder / of_style[name]["image"]) for name in names]
    config = opened_codec(loaded.config.draw.codec).codec.config
    found: dict[str, Any] = {"style": style, "names": count, "guidance": options.guidance}
    with tempfile.TemporaryDirectory() as scratch:
        drawn: list[list[Path]] = [[] for _ in names]
        loops, elapsed = [], []
        for seed in range(SEEDS):
            own = GenerationOptions(**{**vars(options), "seed": seed})
            for number, result in enumerate(draw(engine, names, own)):
                place = Path(scratch) / f"{number}-{seed}.png"
                Image.open(io.BytesIO(result.outputs[0].content)).save(place)
                drawn[number].append(place)
                loops.append(result.mean_loops)
                elapsed.append(result.outputs[0].elapsed)
        first = [str(some[0]) for some in drawn]
        found["ranked_first"] = ranked_first(judge, first, names)
        found["ranked_first_real"] = ranked_first(judge, real, names)
        found["ranked_first_shuffled"] = ranked_first(judge, first[1:] + first[:1], names)
        training = random.Random(SEED).sample(known, min(4000, len(known)))
        pictures = torch.stack([read_patches(folder / r["image"], config) for r in training])
        near = nearest([some[0] for some in drawn], pictures, config)
        found["nearest_training_picture_db"] = sum(near) / len(near)
        found["copies"] = sum(value >= COPY for value in near) / len(near)
        apart = []
        for some in drawn:
            own_patches = torch.stack([from_bytes(read_patches(file, config)) for file in some])
            for other in own_patches[1:]:
                apart.append(float(decibels((other - own_patches[0]).square().mean())))
        found["between_seeds_db"] = sum(apart) / len(apart)
        found["loops_a_code"] = sum(loops) / len(loops)
        found["diffusion_seconds"] = sum(elapsed) / len(elapsed)
        if sheet_file is not None:
            sheet([(Path(r), some) for r, some in zip(real[:16], drawn)], sheet_file)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--names", type=int, default=40)
    parser.add_argument("--style", default="noto", choices=list(TRAIN))
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--draw-steps", type=int, default=8)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    judge = bundled_model("picture-model") / "model.safetensors"
    rows = []
    for loops in (1, 2, 4, loaded.config.max_loops):
        options = GenerationOptions(
            loops=loops, prompt_loops=loops, guidance=arguments.guidance, temperature=1.0,
            max_new_tokens=64, draw_steps=arguments.draw_steps,
        )  # fmt: skip
        count = 10 if arguments.check else arguments.names
        last = loops == loaded.config.max_loops
        found = measure(loaded, arguments.style, count, options, arguments.sheet if last else None)
        rows.append({"loops": loops, **found})
        print(
            f"{loops} loops: the name first of ten {found['ranked_first']:.0%} (real pictures "
            f"{found['ranked_first_real']:.0%}, shuffled {found['ranked_first_shuffled']:.0%}); "
            f"copies {found['copies']:.0%}; {found['between_seeds_db']:.1f} dB between seeds"
        )
    if not arguments.check:
        settings = {
            "judge_sha256": hashlib.sha256(judge.read_bytes()).hexdigest(),
            "codec": loaded.config.draw.codec,
            "draw_steps": arguments.draw_steps,
        }
        write("drawing.run", __doc__.splitlines()[0], rows, settings=settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
