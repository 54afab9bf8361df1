"""Emoji that move: clips whose caption says what moves and how.

    python -m benchmarks.video.moving [--names 600] [--styles 3]
    python -m benchmarks.video.moving --sample    # the clip that ships with the package

writes animated WebP and records into `benchmarks/.data/moving`:
- `train.jsonl`: {"video", "text"}, as "cat face moves left", of names and styles that
  `benchmarks/pictures/emoji.py` trains on; three times as many turns as moves.
- `motions.jsonl`: the same clips with "it moves left", which a model learns motion from first.
- `pairs.jsonl`: clips of names and styles that are not trained on, `video` and `reverse`, `text`
  and `other`.

Each motion has its reverse, which shows the same frames in the opposite order; the two stand side
by side, so that what tells them apart is order alone.

A motion is one of eight, on a ground that stands still. Start, speed, size and ground are drawn at
random, and tell nothing of the motion: what grows is as large on the whole as what shrinks. A
thing keeps its sides and its colours: training mirrors nothing, and reverses no clip under one
caption.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common.corpora import DATA
from benchmarks.common.record import ROOT
from benchmarks.pictures.emoji import JUDGES, TEST, TRAIN, fetch_emoji
from benchmarks.pictures.restyle import kept_of

FOLDER = DATA / "moving"
SIDE, FRAMES = 48, 8
MILLISECONDS = (80, 120, 160)
"""A frame's time, one for each clip."""
REVERSES = {
    "moves left": "moves right",
    "moves up": "moves down",
    "grows": "shrinks",
    "turns left": "turns right",
}
MOTIONS = (*REVERSES, *REVERSES.values())
PAIRS = {"grows": 2, "turns left": 3}
"""Pairs of a picture to train on, where there is more than one: motions that are hard to see."""
WAY = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}


def frames_of(picture: Image.Image, motion: str, rng: np.random.Generator) -> list[Image.Image]:
    """What a picture on a transparent ground does, `FRAMES` pictures of SIDE x SIDE pixels."""
    box = picture.getchannel("A").getbbox() or (0, 0, *picture.size)
    thing = picture.crop(box)
    size = rng.uniform(0.45, 0.65) * SIDE
    amount = rng.uniform(0.6, 1.0)
    # From -1 to 1, so that a motion and its reverse have the same frames.
    progress = np.linspace(-1, 1, FRAMES) * amount
    still = rng.uniform(-0.1, 0.1, 2) * SIDE
    ground, angle = _ground(rng), rng.uniform(-20, 20)
    found = []
    for share in progress:
        scale, turn, (x, y) = 1.0, angle, still
        if motion in WAY:
            right, down = WAY[motion]
            reach = (SIDE - size) / 2 + 4
            x, y = x * (not right) + right * share * reach, y * (not down) + down * share * reach
        elif motion in ("grows", "shrinks"):
            scale = float(np.exp(0.6 * share * (1 if motion == "grows" else -1)))
        else:  # a turn to the left is against the clock
            turn = angle + 75 * share * (1 if motion == "turns left" else -1)
        found.append(_placed(thing, ground, size * scale, turn, (x, y)))
    return found


def _placed(
    thing: Image.Image, ground: Image.Image, size: float, turn: float, at: tuple[float, float]
) -> Image.Image:
    """One frame. at: the thing's middle, in pixels from the frame's."""
    factor = max(1.0, size) / max(thing.size)
    width, height = (max(1, round(side * factor)) for side in thing.size)
    small = thing.resize((width, height), Image.Resampling.LANCZOS)
    small = small.rotate(turn, Image.Resampling.BICUBIC, expand=True)
    frame = ground.copy()
    corner = [round(SIDE / 2 + place - side / 2) for place, side in zip(at, small.size)]
    frame.paste(small, (corner[0], corner[1]), small)
    return frame


def _ground(rng: np.random.Generator) -> Image.Image:
    """White, a colour, or a change from one to another, with nothing in it that could move."""
    kind = rng.integers(3)
    one, other = rng.integers(120, 256, (2, 3)).astype(float)
    if kind == 0:
        one = other = np.full(3, 255.0)
    elif kind == 1:
        other = one
    angle, line = rng.uniform(0, 2 * np.pi), np.linspace(-0.5, 0.5, SIDE)
    share = 0.5 + np.cos(angle) * line[None, :, None] + np.sin(angle) * line[:, None, None]
    mixed = one + (other - one) * share.clip(0, 1)
    return Image.fromarray(mixed.round().astype(np.uint8), "RGB")


def write_clip(frames: list[Image.Image], milliseconds: int, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=milliseconds,
                   quality=80, method=0)  # fmt: skip


def write_pair(
    picture: Image.Image, motion: str, rng: np.random.Generator, name: str
) -> list[tuple[str, str]]:
    """Write a clip and its reverse; each one's file, under `FOLDER`, with its motion."""
    frames, milliseconds = frames_of(picture, motion, rng), int(rng.choice(MILLISECONDS))
    files = {
        f"{name}.webp": (frames, motion),
        f"{name}-reverse.webp": (frames[::-1], REVERSES[motion]),
    }
    for file, (some, _) in files.items():
        write_clip(some, milliseconds, FOLDER / file)
    return [(file, shown) for file, (_, shown) in files.items()]


def stem(record: dict[str, Any]) -> str:
    return str(Path(record["image"]).with_suffix(""))


def suits(record: dict[str, Any]) -> bool:
    """Whether an emoji is a thing that can be seen to move: no arrow, no letter, no flag."""
    return not kept_of(record["text"], record["kind"]).sides


def chosen(
    records: list[dict[str, Any]], names: int, styles: int
) -> Iterator[tuple[dict[str, Any], np.random.Generator]]:
    """So many names, in so many styles each, by a hash that does not depend on the others."""

    def rank(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    by_name: dict[str, list[dict[str, Any]]] = {}
    for record in filter(suits, records):
        by_name.setdefault(record["text"], []).append(record)
    for name in sorted(by_name, key=rank)[:names]:
        for record in sorted(by_name[name], key=lambda r: rank(r["image"]))[:styles]:
            yield record, np.random.default_rng(int(rank(record["image"])[:8], 16))


def make(names: int, styles: int) -> Path:
    """Write both files; returns their folder."""
    emoji = fetch_emoji()
    lines = (emoji / "all.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    seen = [r for r in records if r["style"] in TRAIN and not r["unseen"]]
    new = [r for r in records if r["style"] in {**TEST, **JUDGES} and r["unseen"]]
    train, motions, pairs = [], [], []
    for record, rng in chosen(seen, names, styles):
        picture = Image.open(emoji / record["image"]).convert("RGBA")
        wanted = [motion for motion in REVERSES for _ in range(PAIRS.get(motion, 1))]
        for number, motion in enumerate(wanted):
            for file, text in write_pair(picture, motion, rng, f"train/{stem(record)}-{number}"):
                line = {"video": file, "group": record["text"]}  # equal texts are not one group
                train.append(line | {"text": f"{record['text']} {text}"})
                motions.append(line | {"text": f"it {text}"})
    for record, rng in chosen(new, names, styles):
        picture = Image.open(emoji / record["image"]).convert("RGBA")
        for number, motion in enumerate(REVERSES):
            (file, _), (reverse, other) = write_pair(
                picture, motion, rng, f"pairs/{stem(record)}-{number}"
            )
            pairs.append({"video": file, "reverse": reverse, "text": f"{record['text']} {motion}",
                          "other": f"{record['text']} {other}", "name": record["text"],
                          "motion": motion, "style": record["style"]})  # fmt: skip
    for file, found in (("train", train), ("motions", motions), ("pairs", pairs)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
        (FOLDER / f"{file}.jsonl").write_text(text, "utf-8")
    return FOLDER


def make_sample() -> Path:
    """Noto's octopus, which turns to the left; chosen as the bundled model names it rightly."""
    file = ROOT / "looptx_core/assets/samples/wave.webp"
    picture = Image.open(fetch_emoji() / "noto/1f419.png").convert("RGBA")
    write_clip(frames_of(picture, "turns left", np.random.default_rng(0)), 80, file)
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", type=int, default=600)
    parser.add_argument("--styles", type=int, default=3)
    parser.add_argument("--sample", action="store_true")
    flags = parser.parse_args()
    if flags.sample:
        print(make_sample())
        raise SystemExit
    folder = make(flags.names, flags.styles)
    for file in ("train.jsonl", "motions.jsonl", "pairs.jsonl"):
        print(f"{folder / file}: {(folder / file).read_text('utf-8').count(chr(10))} lines")
