"""What a model draws from names: seen by a reader that never met it, copies, and how seeds differ.

    python -m benchmarks.drawing.run --model FOLDER [--names 40] [--many 500] [--style noto]
        [--guidance 2] [--sheet FILE] [--unseen-sheet FILE] [--check]

Names were trained on in some style. The judge is the picture model that ships with the package, of
one hash: it ranks the name among ten, by what the picture adds to the name's probability. Beside it
stand real pictures of the same names, and the same drawings under another's name, which is chance.
A copy has most codes of a training picture in their places. The Frechet distance is that of the
judge's mean encoder states, of `--many` drawings to the real pictures of their names; beside it
stand the same pictures blurred until they are as far from the sharp ones as the codec leaves them,
and what the codec leaves. Unseen combinations are names in styles that have no such picture, see
`benchmarks/drawing/combinations.py`. With the model's own exits, loops and confidence are kept by
the place of a code. `--sheet` and `--unseen-sheet` write drawings beside real pictures. `--check`
draws few pictures and leaves no record.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from benchmarks.common.codecs import writer_settings
from benchmarks.common.record import finish
from benchmarks.drawing.combinations import NAMES, draw_combinations
from benchmarks.drawing.judge import JUDGE, SEED, draw, judge_of_drawings, ranked_first, sheet
from benchmarks.pictures.emoji import COLOURED, fetch_emoji, styled
from benchmarks.pictures.run import Captions
from looptx_core.checkpoint.folder import load_model
from looptx_core.checkpoint.registry import resolve_model
from looptx_core.config.codec import CodecConfig
from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.engine import Engine
from looptx_core.media.batch import batch_items
from looptx_core.media.codec.codec import Codec
from looptx_core.media.codec.opened import opened_codec
from looptx_core.media.image.coded import read_patches, to_picture
from looptx_core.training.codec import decibels, from_bytes

COPY = 0.75
"""The share of a training picture's codes, each in its place, that makes a drawing its copy."""
SEEDS = 4


def features(judge: Captions, pictures: list[str]) -> Tensor:
    """The judge's encoder states, their mean over each picture: (pictures, numbers)."""
    found = []
    with torch.no_grad():
        for picture in pictures:
            item = judge.item("image", picture)
            found.append(judge.loaded.model.encode(batch_items([item]))["image"].vectors.mean(0))
    return torch.stack(found).double()


def frechet(one: Tensor, other: Tensor) -> float:
    """The distance of two normal distributions fitted to features (arXiv 1706.08500, section 1)."""
    apart = (one.mean(0) - other.mean(0)).square().sum()
    first, second = one.T.cov(), other.T.cov()
    # The trace of the root of a product is the sum of the roots of its eigenvalues.
    roots = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    return float(apart + first.trace() + second.trace() - 2 * roots)


def blurred(files: list[str], config: CodecConfig, target: float, folder: Path) -> list[str]:
    """Pictures blurred by one radius that leaves them `target` dB from the sharp ones."""
    sharp = [to_picture(from_bytes(read_patches(file, config)), config) for file in files]

    def apart(radius: float) -> float:
        errors = [
            (pixels(picture) - pixels(picture.filter(ImageFilter.GaussianBlur(radius))))
            .square().mean() for picture in sharp
        ]  # fmt: skip
        return float(decibels(torch.stack(errors)).mean())

    low, high = 0.05, 8.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if apart(middle) > target else (low, middle)
    places = []
    for number, picture in enumerate(sharp):
        places.append(str(folder / f"blurred-{number}.png"))
        picture.filter(ImageFilter.GaussianBlur(low)).save(places[-1])
    return places


def pixels(picture: Image.Image) -> Tensor:
    return from_bytes(torch.from_numpy(np.asarray(picture).copy()))


def distances(
    engine: Engine, judge: Captions, records: list[dict[str, Any]], options: GenerationOptions
) -> dict[str, Any]:
    """Frechet distances to the real pictures of `records`."""
    codec = opened_codec(engine.model.config.draw.codec).codec
    folder = fetch_emoji()
    real = [str(folder / record["image"]) for record in records]
    known = features(judge, real)
    with tempfile.TemporaryDirectory() as scratch:
        drawn = []
        for start in range(0, len(records), 32):
            some = [styled(r["text"], r["style"]) for r in records[start : start + 32]]
            for number, result in enumerate(draw(engine, some, options)):
                drawn.append(f"{scratch}/{start + number}.png")
                Path(drawn[-1]).write_bytes(result.outputs[0].content)
        patches = torch.stack([from_bytes(read_patches(file, codec.config)) for file in real])
        codes = torch.cat([codec.encode(some, codec.grid) for some in patches.split(64)])
        kept = torch.cat([codec.decode(some, codec.grid, steps=1) for some in codes.split(64)])
        target = float(decibels((kept.float() - patches).square().mean((1, 2))).mean())
        coded = []
        for number, picture in enumerate(kept):
            coded.append(f"{scratch}/coded-{number}.png")
            to_picture(picture, codec.config).save(coded[-1])
        soft = blurred(real, codec.config, target, Path(scratch))
        return {
            "pictures": len(real),
            "codec_db": target,
            "drawn": frechet(features(judge, drawn), known),
            "through_the_codec": frechet(features(judge, coded), known),
            "blurred": frechet(features(judge, soft), known),
        }


def closest(codes: Tensor, known: Tensor) -> Tensor:
    """The largest share of codes, each in its place, that each drawing has of a known picture."""
    return torch.stack([(known == own).float().mean(1).max() for own in codes])


class Names(NamedTuple):
    """The names to draw, and what stands beside the drawings."""

    records: list[dict[str, Any]]
    """Of the style, the first so many to rank and all to compare as sets."""
    known: Tensor
    """The codes of every picture that was trained on, (pictures, codes)."""


def names_of(style: str, count: int, codec: Codec) -> Names:
    folder = fetch_emoji()
    records = list(map(json.loads, (folder / "all.jsonl").read_text("utf-8").splitlines()))
    trained = [r for r in records if not r["unseen"] and r["style"] == style]
    chosen = list({record["text"]: record for record in trained}.values())
    random.Random(SEED).shuffle(chosen)
    pictures = torch.stack([read_patches(folder / r["image"], codec.config) for r in trained])
    codes = [codec.encode(from_bytes(some), codec.grid) for some in pictures.split(128)]
    return Names(chosen[:count], torch.cat(codes))


def measure(
    engine: Engine,
    judge: Captions,
    names: Names,
    options: GenerationOptions,
    sheet_file: Path | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the judge and the training pictures say of `SEEDS` drawings of each name, and what
    their codes took by place."""
    texts = [record["text"] for record in names.records]
    prompts = [styled(record["text"], record["style"]) for record in names.records]
    real = [str(fetch_emoji() / record["image"]) for record in names.records]
    draw_config = engine.model.config.draw
    config = opened_codec(draw_config.codec).codec.config
    with tempfile.TemporaryDirectory() as scratch:
        drawn: list[list[Path]] = [[] for _ in texts]
        written, loops, elapsed, codes_of = [], [], [], []
        for seed in range(SEEDS):
            for number, result in enumerate(draw(engine, prompts, replace(options, seed=seed))):
                (output,) = result.outputs
                drawn[number].append(Path(scratch) / f"{number}-{seed}.png")
                drawn[number][-1].write_bytes(output.content)
                loops.append(result.mean_loops)
                codes_of.append(result.media[0])
                elapsed.append(output.elapsed)
                if not seed:
                    codes = output.ids[: names.known.shape[1]]
                    written.append([id_ - draw_config.first_code for id_ in codes])
        first = [str(some[0]) for some in drawn]
        shares = closest(torch.tensor(written), names.known)
        apart = []
        for some in drawn:
            patches = torch.stack([from_bytes(read_patches(file, config)) for file in some])
            apart += decibels((patches[1:] - patches[0]).square().mean((1, 2))).tolist()
        if sheet_file is not None:
            sheet([(Path(r), some) for r, some in zip(real[:16], drawn)], sheet_file)
        figures = {
            "names": len(texts),
            "ranked_first": ranked_first(judge, first, texts),
            "ranked_first_real": ranked_first(judge, real, texts),
            "ranked_first_shuffled": ranked_first(judge, first[1:] + first[:1], texts),
            "codes_of_the_nearest": float(shares.mean()),
            "copies": float((shares >= COPY).float().mean()),
            "between_seeds_db": sum(apart) / len(apart),
            "loops_a_code": sum(loops) / len(loops),
            "diffusion_seconds": sum(elapsed) / len(elapsed),
        }
        return figures, by_place(codes_of, draw_config.columns)


def by_place(drawn: list[dict[str, Any]], columns: int) -> list[dict[str, Any]]:
    """Mean loops and confidence of the codes at each place, a row for each row of a picture."""
    means = {
        key: torch.tensor([each[key] for each in drawn]).double().mean(0).view(-1, columns)
        for key in ("loops", "confidence")
    }
    return [
        {"row": row, **{key: [round(v, 4) for v in values[row].tolist()]
                        for key, values in means.items()}}
        for row in range(len(means["loops"]))
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="A run or a model folder.")
    parser.add_argument("--names", type=int, default=40)
    parser.add_argument("--many", type=int, default=500, help="Drawings for Frechet's distance.")
    parser.add_argument("--style", default="noto", choices=COLOURED)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--draw-steps", type=int, default=8)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--unseen-sheet", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    loaded = load_model(resolve_model(arguments.model).folder)
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit)
    judge, many = judge_of_drawings(), 20 if arguments.check else arguments.many
    names = names_of(arguments.style, many, opened_codec(loaded.config.draw.codec).codec)
    few = names._replace(records=names.records[: 10 if arguments.check else arguments.names])
    rows: list[dict[str, Any]] = []
    most = loaded.config.max_loops
    depths = [most] if arguments.check else sorted({1, 2, 4, most})
    for loops in (*depths, "auto"):
        options = GenerationOptions(
            loops=loops, prompt_loops=None if loops == "auto" else loops,
            guidance=arguments.guidance, temperature=1.0, max_new_tokens=64,
            draw_steps=arguments.draw_steps,
        )  # fmt: skip
        place = arguments.sheet if loops == most else None
        found, places = measure(engine, judge, few, options, place)
        rows.append({"part": "names", "loops": loops, **found})
        if loops == "auto":
            rows += [{"part": "places", **each} for each in places]
        place = arguments.unseen_sheet if loops == most else None
        count = 10 if arguments.check else NAMES
        unseen = draw_combinations(engine, judge, count, options, place)
        rows.append({"part": "unseen combinations", "loops": loops, **unseen})
        print(
            f"{loops} loops: the name first of ten {found['ranked_first']:.0%} (real pictures "
            f"{found['ranked_first_real']:.0%}, shuffled {found['ranked_first_shuffled']:.0%}); "
            f"copies {found['copies']:.0%}; {found['between_seeds_db']:.1f} dB between seeds; "
            f"unseen combinations {unseen['ranked_first']:.0%}, as noto "
            f"{unseen['ranked_first_seen']:.0%}, shuffled {unseen['ranked_first_shuffled']:.0%}"
        )
    options = replace(options, loops=most, prompt_loops=most)
    rows.append({"part": "distance", **distances(engine, judge, names.records, options)})
    print(json.dumps(rows[-1]))
    return finish(
        "drawing.run", __doc__.splitlines()[0], rows, arguments.check,
        style=arguments.style, guidance=arguments.guidance, draw_steps=arguments.draw_steps,
        judge_sha256=JUDGE, **writer_settings(loaded),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
