"""What a model sees of motion: minimal pairs of clips, one motion of eight, and names.

    python -m benchmarks.video.run --model FOLDER [--count 96] [--check]

The model comes from `benchmarks/video/model.yaml` or its like. Names and styles of the clips were
not trained on. A pair is a clip and its reverse, which have the same frames; it is right where each
of the two captions costs less beside its own clip. The controls see no order. All frames the middle
one, and the frames shuffled alike for both clips of a pair, can't be right of both; where each clip
is shuffled by itself, guesses are right of both in a quarter of the pairs.
`--check` takes few clips and leaves no record.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.kinds import words_by_kind
from benchmarks.common.record import write
from benchmarks.pictures.emoji import TEST, fetch_emoji
from benchmarks.pictures.run import Captions, right_or_shuffled
from benchmarks.video.moving import FOLDER, MOTIONS, make
from looptx_core.checkpoint.folder import load_model
from looptx_core.checkpoint.registry import bundled_model, resolve_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.engine import Engine, MediaPrompt
from looptx_core.media.batch import MediaItem

SEED = 0
DRAWS = 3
"""Of nine other names for each clip."""


def with_frames(clip: MediaItem, order: list[int]) -> MediaItem:
    """The clip with its frames in another order, some perhaps several times."""
    steps, rows, columns, _ = clip.grid
    pairs = clip.features.view(steps, rows * columns, 2, -1)
    frames = pairs.transpose(1, 2).flatten(0, 1)[order]
    again = frames.view(steps, 2, rows * columns, -1).transpose(1, 2)
    return clip._replace(features=again.reshape(clip.features.shape))


def both_ways(count: int, rng: random.Random) -> list[list[int]]:
    """A clip and its reverse, which has the same frames from the other end."""
    return [list(range(count)), list(range(count))[::-1]]


def one_frame(count: int, rng: random.Random) -> list[list[int]]:
    return [[count // 2] * count]


def shuffled_alike(count: int, rng: random.Random) -> list[list[int]]:
    return [rng.sample(range(count), count)]


def shuffled_apart(count: int, rng: random.Random) -> list[list[int]]:
    return [rng.sample(range(count), count) for _ in range(2)]


VIEWS: dict[str, Callable[[int, random.Random], list[list[int]]]] = {
    "clips": both_ways, "one frame": one_frame, "frames shuffled": shuffled_alike,
    "each clip's frames shuffled": shuffled_apart,
}  # fmt: skip
"""The orders of the frames that a clip and its reverse are seen in; one where they agree."""


def motions(captions: Captions, pairs: list[dict[str, Any]], view: str) -> list[dict[str, Any]]:
    """Shares of right pairs, and of the right motion of eight, by loop; a row for each motion."""
    rng = random.Random(SEED)
    hits: dict[str, list[torch.Tensor]] = {}
    for pair in pairs:
        found = []
        clip = captions.item("video", pair["video"])
        texts = [f"{pair['name']} {motion}" for motion in MOTIONS]
        for one in VIEWS[view](2 * clip.grid[0], rng):
            losses = captions.losses(with_frames(clip, one), texts, captions.loops)
            found.append(dict(zip(MOTIONS, losses.T)))
        own, other = pair["motion"], pair["other"].removeprefix(pair["name"]).strip()
        both = (found[0][own] < found[0][other]) & (found[-1][other] < found[-1][own])
        stacked = torch.stack(list(found[0].values()))
        right = stacked.argmin(0) == MOTIONS.index(own)
        hits.setdefault(own, []).append(torch.stack([both, right]).float())
    every = [hit for some in hits.values() for hit in some]
    return [
        {
            "part": "motions", "seen": view, "motion": motion, "pairs": len(some),
            "pairs_right_by_loop": torch.stack(some).mean(0)[0].tolist(),
            "of_eight_right_by_loop": torch.stack(some).mean(0)[1].tolist(),
        }
        for motion, some in {"all": every, **hits}.items()
    ]  # fmt: skip


def names(captions: Captions, pairs: list[dict[str, Any]], known: set[str]) -> list[dict[str, Any]]:
    """How often the right name of ten costs least beside the clip, and beside one frame of it.

    known: the names that the other nine are drawn from.
    """
    ways: dict[str, list[torch.Tensor]] = {"clip": [], "one frame": []}
    for number, pair in enumerate(pairs):
        rng = random.Random(SEED + number)
        clip = captions.item("video", pair["video"])
        still = with_frames(clip, one_frame(2 * clip.grid[0], rng)[0])
        others = sorted(known - {pair["name"]})
        for _ in range(DRAWS):
            texts = [f"{n} {pair['motion']}" for n in (pair["name"], *rng.sample(others, 9))]
            alone = captions.losses(None, texts, captions.loops)
            for way, item in (("clip", clip), ("one frame", still)):
                gained = alone - captions.losses(item, texts, captions.loops)
                ways[way].append((gained.argmax(1) == 0).float())
    return [
        {"part": "names", "seen": way, "clips": len(pairs),
         "of_ten_right_by_loop": torch.stack(found).mean(0).tolist()}
        for way, found in ways.items()
    ]  # fmt: skip


def words(captions: Captions, pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loops and confidence of the captions that the model writes of clips, by kind of token."""
    loaded = captions.loaded
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit, ends=loaded.special.ends)
    clips = [MediaPrompt("", (captions.item("video", pair["video"]),)) for pair in pairs]
    found = engine.complete(clips, GenerationOptions(temperature=0, max_new_tokens=40))
    return [{"part": "words", "seen": "clips", **row} for row in words_by_kind(found)]


def pictures(captions: Captions, before: Captions, count: int) -> list[dict[str, Any]]:
    """What captions cost beside pictures in styles never trained on, before and after the clips."""
    lines = (fetch_emoji() / "all.jsonl").read_text("utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["style"] in TEST]
    chosen = random.Random(SEED).sample(records, count)
    return [
        {"part": "pictures", "model": name, **right_or_shuffled(model, chosen)}
        for name, model in (("of pictures", before), ("of clips too", captions))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="A run or a model folder.")
    parser.add_argument("--count", type=int, default=96, help="Pairs.")
    parser.add_argument("--check", action="store_true", help="Few clips, and no record.")
    args = parser.parse_args()
    if not (FOLDER / "pairs.jsonl").exists():
        make(600, 3)
    lines = (FOLDER / "pairs.jsonl").read_text("utf-8").splitlines()
    everything = [json.loads(line) for line in lines]
    count = min(len(everything), 4 if args.check else args.count)
    pairs = random.Random(SEED).sample(everything, count)
    loaded = load_model(resolve_model(args.model).folder)
    captions = Captions(loaded, FOLDER)
    rows = [row for view in VIEWS for row in motions(captions, pairs, view)]
    known = {pair["name"] for pair in everything}
    rows += names(captions, pairs[: len(pairs) // 2], known)
    rows += words(captions, pairs)
    before = Captions(load_model(bundled_model("picture-model")), fetch_emoji())
    after = Captions(loaded, fetch_emoji())
    rows += pictures(after, before, 10 if args.check else 300)
    for row in rows:
        shares = {k: v for k, v in row.items() if k.endswith("_by_loop")}
        if row.get("motion", "all") == "all":
            told = ", ".join(f"{k[:-8]} {v[0]:.3f} to {v[-1]:.3f}" for k, v in shares.items())
            seen = row.get("seen") or row["model"]
            loops = f"{row['mean_loops']:.2f} loops" if "kind" in row else told
            print(f"{row['part']}, {row.get('kind', seen)}: {loops} (1 to {captions.loops})")
    if not args.check:
        settings = {
            "seed": SEED, "steps": loaded.facts.get("steps"),
            "styles": sorted({pair["style"] for pair in pairs}),
            "names": len({pair["name"] for pair in pairs}),
        }  # fmt: skip
        write("video.run", __doc__.splitlines()[0], rows, settings=settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
