"""What a model says of pictures: the right one against another, one name of ten, and cats.

    python benchmarks/pictures.py [--model FOLDER] [--check]

The model must come from `benchmarks/picture_model.yaml` or the like: names that are `unseen` in
`benchmarks/emoji.py` and the styles of Facebook and Apple were not trained on. Written to
`benchmarks/results/pictures.json`. `--check` takes few pictures.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from emoji import fetch_emoji

from looptx_core.checkpoint.folder import LoadedModel, load_model
from looptx_core.checkpoint.registry import bundled_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.data.pictures import read_picture
from looptx_core.generation.engine import Engine, PicturePrompt
from looptx_core.model.vision import Picture, together
from looptx_core.training.evaluate import evaluate_loops

RESULTS = Path(__file__).parent / "results" / "pictures.json"
SEED = 0
STYLES = ("facebook", "apple")


class Captions:
    """Losses of names beside pictures."""

    def __init__(self, loaded: LoadedModel, folder: Path) -> None:
        self.loaded, self.folder = loaded, folder
        self.loops = loaded.config.max_loops

    def picture(self, record: dict[str, Any]) -> Picture:
        return read_picture(self.folder / record["image"], self.loaded.config)

    def losses(self, picture: Picture | None, names: list[str]) -> tuple[torch.Tensor, list[int]]:
        """Nats of each name in all, by loop, (loops, names); and the tokens of each."""
        encode, end = self.loaded.tokenizer.encode, 0
        image = [self.loaded.config.image_token] * (len(picture.patches) if picture else 0)
        sums, counts = [], []
        for name in names:
            ids = encode(name).ids
            tokens = torch.tensor([[end, *image, *ids, end]])
            counted = torch.zeros(1, tokens.shape[1] - 1, dtype=torch.bool)
            counted[0, len(image) :] = True
            pictures = together([picture]) if picture else None
            found = evaluate_loops(
                self.loaded.model, tokens, self.loops, counted, pictures=pictures
            )
            sums.append(found.loss)
            counts.append(len(ids) + 1)
        return torch.stack(sums, 1), counts


def right_or_shuffled(captions: Captions, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The names' loss beside their own pictures and beside one another's, nats a token by loop."""
    own = other = torch.zeros(captions.loops, dtype=torch.float64)
    tokens = 0
    for record, shuffled in zip(records, records[1:] + records[:1]):
        loss, (count,) = captions.losses(captions.picture(record), [record["text"]])
        own, tokens = own + loss[:, 0], tokens + count
        loss, _ = captions.losses(captions.picture(shuffled), [record["text"]])
        other = other + loss[:, 0]
    return {
        "pictures": len(records),
        "loss_by_loop": (own / tokens).tolist(),
        "shuffled_by_loop": (other / tokens).tolist(),
        "difference": float((other - own)[-1] / tokens),
    }


def one_of_ten(captions: Captions, records: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the right name of ten gains most by the picture over no picture, by loop."""
    draw = random.Random(SEED)
    names = sorted({record["text"] for record in records})
    alone = {name: captions.losses(None, [name])[0][:, 0] for name in names}
    hits = torch.zeros(captions.loops)
    for record in records:
        others = draw.sample([name for name in names if name != record["text"]], 9)
        choices = [record["text"], *others]
        with_picture, _ = captions.losses(captions.picture(record), choices)
        gained = torch.stack([alone[name] for name in choices], 1) - with_picture
        hits += gained.argmax(1) == 0
    return {"pictures": len(records), "accuracy_by_loop": (hits / len(records)).tolist()}


def cats(captions: Captions, engine: Engine, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Greedy captions of 20 cats and 40 other pictures, in styles never trained on."""
    draw = random.Random(SEED)
    named = [r for r in records if "cat" in r["text"].split()]
    others = [r for r in records if "cat" not in r["text"].split()]
    options = GenerationOptions(temperature=0, max_new_tokens=24)
    shares, said = [], {}
    for kind, pool, count in (("cats", named, 20), ("others", others, 40)):
        chosen = draw.sample(pool, min(count, len(pool)))
        prompts = [PicturePrompt("", (captions.picture(record),)) for record in chosen]
        found = engine.complete(prompts, options)
        shares.append(sum("cat" in g.text.split() for g in found) / len(chosen))
        said[kind] = [
            {"picture": r["image"], "name": r["text"], "caption": g.text, "loops": g.mean_loops}
            for r, g in zip(chosen, found)
        ]
    return {"cat_said_of_cats": shares[0], "cat_said_of_others": shares[1], **said}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=bundled_model("picture-model"))
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    folder = fetch_emoji()
    loaded = load_model(arguments.model)
    captions = Captions(loaded, folder)
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit)
    lines = (folder / "all.jsonl").read_text("utf-8").splitlines()
    new = [r for r in map(json.loads, lines) if r["style"] in STYLES]
    draw = random.Random(SEED)
    seen = draw.sample([r for r in new if not r["unseen"]], 20 if arguments.check else 150)
    unseen = [r for r in new if r["unseen"] and r["style"] == "facebook"]
    unseen = draw.sample(unseen, min(len(unseen), 20 if arguments.check else 150))
    found = {
        "command": "python benchmarks/pictures.py",
        "seed": SEED,
        "styles_never_trained_on": list(STYLES),
        "seen_names": right_or_shuffled(captions, seen),
        "unseen_names": right_or_shuffled(captions, unseen),
        "one_of_ten_unseen": one_of_ten(captions, unseen),
        "cats": cats(captions, engine, [r for r in new if not r["unseen"]]),
    }
    for name in ("seen_names", "unseen_names"):
        print(f"{name}: the right picture is worth {found[name]['difference']:.2f} nats a token")
    ten = found["one_of_ten_unseen"]["accuracy_by_loop"]
    print(f"one name of ten, unseen emoji: {ten[0]:.0%} at one loop, {ten[-1]:.0%} at the last")
    says = found["cats"]
    print(f"'cat' said of {says['cat_said_of_cats']:.0%} of the cats and "
          f"{says['cat_said_of_others']:.0%} of the others")  # fmt: skip
    if not arguments.check:
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
