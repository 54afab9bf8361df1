"""What a model names emoji in styles that it never saw.

    python -m benchmarks.pictures.styles --model FOLDER [--variant NAME] [--count 150] [--check]

Greedy captions, in each style of `JUDGES` and `TEST` of `benchmarks/pictures/emoji.py`, of twelve
common names and of names drawn from animals, food, plants, vehicles and things. All names were
trained on in other styles. A common name is right where its noun is in the caption's name, any
other where the whole name is the same; what stands before the last colon, such as a kind, is no
part of a name. `--check` takes few pictures and leaves no record.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.record import write
from benchmarks.pictures.emoji import JUDGES, TEST, fetch_emoji
from looptx_core.checkpoint.folder import load_model
from looptx_core.checkpoint.registry import bundled_model, resolve_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.engine import Engine, MediaPrompt
from looptx_core.media.registry import MEDIA

SEED = 0
COMMON = {
    "cat face": "cat", "dog face": "dog", "red apple": "apple", "banana": "banana",
    "automobile": "car automobile", "bicycle": "bicycle", "deciduous tree": "tree",
    "umbrella": "umbrella", "guitar": "guitar", "open book": "book", "key": "key",
    "house building": "house",
}  # fmt: skip
"""Twelve names, with the nouns one of which a right caption has."""
KINDS = re.compile(
    "animal|food|plant|transport (ground|water|air)|tool|household|clothing|musical|sport|"
    "computer|phone|book|sky|place building|drink|dishware|science"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="A run or a model folder; absent: the bundled one.")
    parser.add_argument("--variant", default="", help="What the record's name ends in.")
    parser.add_argument("--count", type=int, default=150, help="Names of each style.")
    parser.add_argument("--check", action="store_true", help="Few pictures, and no record.")
    args = parser.parse_args()
    folder = fetch_emoji()
    chosen = resolve_model(args.model).folder if args.model else bundled_model("picture-model")
    loaded = load_model(chosen)
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit)
    records = [json.loads(line) for line in (folder / "all.jsonl").read_text("utf-8").splitlines()]
    rows = []
    for style in (*JUDGES, *TEST):
        own = [r for r in records if r["style"] == style and not r["unseen"]]
        common = [r for r in own if r["text"] in COMMON]
        pool = [r for r in own if KINDS.match(r["kind"]) and r["text"] not in COMMON]
        count = min(len(pool), 8 if args.check else args.count)
        others = random.Random(SEED).sample(pool, count)
        said = captions(engine, folder, common + others)
        nouns = [COMMON[r["text"]].split() for r in common]
        right = [any(noun in name.split() for noun in some) for some, name in zip(nouns, said)]
        exact = [r["text"] == name for r, name in zip(others, said[len(common) :])]
        rows.append(
            {"style": style, "common": len(common), "common_right": sum(right),
             "names": len(others), "names_right": sum(exact) / len(exact),
             "captions": [f"{r['text']}: {name}" for r, name in zip(common, said)]}
        )  # fmt: skip
        print(f"{style}: {sum(right)} of {len(common)} common names, "
              f"{rows[-1]['names_right']:.0%} of {len(others)} others")  # fmt: skip
    if not args.check:
        settings = {"seed": SEED, "steps": loaded.facts.get("steps")}
        write("pictures.styles", __doc__.splitlines()[0], rows, variant=args.variant,
              settings=settings)  # fmt: skip
    return 0


def captions(engine: Engine, folder: Path, records: list[dict[str, Any]]) -> list[str]:
    """The name that a greedy caption gives each picture."""
    config = engine.model.config
    prompts = [
        MediaPrompt("", (MEDIA["image"].read(folder / r["image"], config),)) for r in records
    ]
    options = GenerationOptions(temperature=0, max_new_tokens=20)
    return [found.text.split(": ")[-1].strip() for found in engine.complete(prompts, options)]


if __name__ == "__main__":
    sys.exit(main())
