"""What a model says of pictures: the right one against another, one name of ten, and cats.

    python -m benchmarks.pictures.run [--model FOLDER] [--check]

The model must come from `benchmarks/pictures/model.yaml` or its like: names that are `unseen` in
`pictures/emoji.py` and the styles of Facebook and Apple were not trained on. The photographs of
`tuxpaint-stamps-default`, fetched by apt-get, are nothing like what it saw and are reported apart.
`--check` takes few pictures and leaves no record.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.corpora import fetch_stamps
from benchmarks.common.record import flat, write
from benchmarks.pictures.emoji import TEST, TRAIN, fetch_emoji
from looptx_core.checkpoint.folder import LoadedModel, load_model
from looptx_core.checkpoint.registry import bundled_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.engine import Engine, MediaPrompt
from looptx_core.media.batch import MediaItem, batch_items
from looptx_core.media.registry import MEDIA
from looptx_core.training.evaluate import evaluate_loops

SEED = 0
RANKED = 3
"""Loops at which names are ranked; more change nothing, and cost."""
DRAWS = 3
"""Of nine others for each picture."""


class Captions:
    """What names cost beside pictures, and beside none."""

    def __init__(self, loaded: LoadedModel, folder: Path) -> None:
        self.loaded, self.folder = loaded, folder
        self.loops = loaded.config.max_loops
        self.ranked = min(RANKED, self.loops)
        self._known: dict[str | None, dict[str, torch.Tensor]] = {}

    def item(self, medium: str, file: str) -> MediaItem:
        return MEDIA[medium].read(self.folder / file, self.loaded.config)

    def picture(self, record: dict[str, Any]) -> MediaItem:
        return self.item("image", record["image"])

    def losses(self, picture: MediaItem | None, names: list[str], loops: int) -> torch.Tensor:
        """Nats of each name in all, its end included, after each loop: (loops, names)."""
        encode, end = self.loaded.tokenizer.encode, 0
        token = MEDIA[picture.medium].token(self.loaded.config) if picture else 0
        image = [token] * (picture.length if picture else 0)
        rows = [[end, *image, *encode(name).ids, end] for name in names]
        tokens = torch.full((len(rows), max(map(len, rows))), end)
        counted = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
            counted[row, len(image) + 1 : len(ids)] = True
        counted = counted[:, 1:]
        media = batch_items([picture] * len(rows)) if picture else None
        found = evaluate_loops(self.loaded.model, tokens, loops, counted, media=media)
        sums = torch.zeros(loops, len(rows), dtype=torch.float64)
        return sums.index_add_(1, counted.nonzero()[:, 0], found.token_loss.double())

    def ranked_by(self, record: dict[str, Any] | None, names: list[str]) -> torch.Tensor:
        """`losses` after the loops that names are ranked by; each is worked out once."""
        known = self._known.setdefault(record and record["image"], {})
        new = [name for name in dict.fromkeys(names) if name not in known]
        if new:
            picture = record and self.picture(record)
            known.update(zip(new, self.losses(picture, new, self.ranked).T))
        return torch.stack([known[name] for name in names], 1)

    def tokens(self, name: str) -> int:
        """Targets of a name, its end included."""
        return len(self.loaded.tokenizer.encode(name).ids) + 1


def right_or_shuffled(captions: Captions, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The names' loss beside their own pictures and beside one another's, nats a token by loop."""
    own = other = torch.zeros(captions.loops, dtype=torch.float64)
    for record, shuffled in zip(records, records[1:] + records[:1]):
        names, loops = [record["text"]], captions.loops
        own = own + captions.losses(captions.picture(record), names, loops)[:, 0]
        other = other + captions.losses(captions.picture(shuffled), names, loops)[:, 0]
    tokens = sum(captions.tokens(record["text"]) for record in records)
    return {
        "pictures": len(records),
        "loss_by_loop": (own / tokens).tolist(),
        "shuffled_by_loop": (other / tokens).tolist(),
        "difference": float((other - own)[-1] / tokens),
    }


def typical(
    captions: Captions, names: list[str], pictures: list[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """-log of the mean probability of each name over these pictures, (loops,)."""
    found = torch.stack([captions.ranked_by(record, names) for record in pictures])
    mean = -(torch.logsumexp(-found, 0) - math.log(len(pictures)))
    return dict(zip(names, mean.T))


def one_of_ten(
    captions: Captions,
    records: list[dict[str, Any]],
    shown: list[dict[str, Any]],
    forms: tuple[str, ...] = ("text",),
) -> dict[str, Any]:
    """How often the right caption of ten is first, by loop, for three ways to rank.

    `probability`: log p(caption | picture), which favours short and common ones whatever is shown.
    `over_other_pictures`: pointwise mutual information, log p(caption | picture) - log p(caption),
    with p(caption) the mean over the pictures `shown`. `over_no_picture`: p(caption) as a text.
    forms: the fields that hold a caption; of several, what each says is summed up.
    """
    reconstruct = random.Random(SEED)
    hits: dict[str, torch.Tensor] = {}
    usual = {form: typical(captions, sorted({r[form] for r in records}), shown) for form in forms}
    for record in records:
        others = [r for r in records if r["text"] != record["text"]]
        for _ in range(DRAWS):
            choices = [record, *reconstruct.sample(others, 9)]
            ways: dict[str, torch.Tensor] = {}
            for form in forms:
                texts = [choice[form] for choice in choices]
                cost = captions.ranked_by(record, texts)
                seen = torch.stack([usual[form][text] for text in texts], 1)
                alone = captions.ranked_by(None, texts)
                for way, gained in (
                    ("probability", -cost),
                    ("over_other_pictures", seen - cost),
                    ("over_no_picture", alone - cost),
                ):
                    ways[way] = ways.get(way, 0) + gained
            for way, gained in ways.items():
                hits[way] = hits.get(way, 0) + (gained.argmax(1) == 0).float()
    tries = DRAWS * len(records)
    return {
        "pictures": len(records),
        "draws_of_nine_others": DRAWS,
        **{f"{way}_by_loop": (hit / tries).tolist() for way, hit in hits.items()},
    }


def cats(captions: Captions, engine: Engine, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Greedy captions of 20 cats and 40 other pictures, in styles never trained on."""
    reconstruct = random.Random(SEED)
    named = [r for r in records if "cat" in r["text"].split()]
    others = [r for r in records if "cat" not in r["text"].split()]
    options = GenerationOptions(temperature=0, max_new_tokens=24)
    shares, said = [], {}
    for kind, pool, count in (("cats", named, 20), ("others", others, 40)):
        chosen = reconstruct.sample(pool, min(count, len(pool)))
        prompts = [MediaPrompt("", (captions.picture(record),)) for record in chosen]
        found = engine.complete(prompts, options)
        shares.append(sum("cat" in g.text.split() for g in found) / len(chosen))
        said[kind] = [
            {"picture": r["image"], "name": r["text"], "caption": g.text, "loops": g.mean_loops}
            for r, g in zip(chosen, found)
        ]
    beyond = sum("cat" in one["caption"].split(": ")[-1].split() for one in said["cats"])
    return {
        "cat_said_of_cats": shares[0],
        "cat_said_of_others": shares[1],
        "cat_said_of_cats_after_the_kind": beyond / len(said["cats"]),
        **said,
    }


def stamps(captions: Captions, engine: Engine, count: int) -> dict[str, Any]:
    """Photographs, of a kind that was never trained on, with the first sentence of each."""
    found = []
    for file in sorted(fetch_stamps().rglob("*.png")):
        text = file.with_suffix(".txt")
        # Most others are photographs; letters, coins and cartoons are none.
        if text.is_file() and not {"symbols", "cartoon"} & set(file.parts):
            words = text.read_text("utf-8").splitlines()[0].lower().rstrip(".")
            found.append({"image": str(file), "text": words})
    chosen = random.Random(SEED).sample(found, count)
    options = GenerationOptions(temperature=0, max_new_tokens=24)
    prompts = [MediaPrompt("", (captions.picture(record),)) for record in chosen[:20]]
    return {
        **right_or_shuffled(captions, chosen),
        "one_of_ten": one_of_ten(captions, chosen, chosen[: count // 3]),
        "captions": [
            {"picture": Path(r["image"]).stem, "text": r["text"], "caption": g.text}
            for r, g in zip(chosen, engine.complete(prompts, options))
        ],
    }


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One for each part's figures, and one for each caption."""
    each = []
    for part, figures in found.items():
        lists = {k: v for k, v in figures.items() if isinstance(v, list) and isinstance(v[0], dict)}
        each.append({"part": part, **flat({k: v for k, v in figures.items() if k not in lists})})
        for kind, captions in lists.items():
            each += [{"part": f"{part}: {kind}", **caption} for caption in captions]
    return each


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
    records = list(map(json.loads, (folder / "all.jsonl").read_text("utf-8").splitlines()))
    new = [r for r in records if r["style"] in TEST]
    few, reconstruct = arguments.check, random.Random(SEED)

    def some(pool: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        return reconstruct.sample(pool, min(len(pool), 20 if few else count))

    trained = some([r for r in records if r["style"] in TRAIN and not r["unseen"]], 100)
    seen = some([r for r in new if not r["unseen"]], 150)
    unseen = some([r for r in new if r["unseen"] and r["style"] == "facebook"], 150)
    known = some([r for r in records if r["unseen"] and r["style"] == "noto"], 150)
    for record in unseen:
        record["kind said"] = f"{record['kind']}: {record['text']}"
    # The forms in which captions were trained: the name, the emoji data's own kind before it, and
    # Unicode's annotations before that.
    forms = {"": ("text",), "_with_kinds": ("kind said",), "_with_annotations": ("said",),
             "_in_all_three_forms": ("text", "kind said", "said")}  # fmt: skip
    found = {
        "seen_names": right_or_shuffled(captions, seen),
        "unseen_names": right_or_shuffled(captions, unseen),
        **{
            f"one_of_ten_unseen{name}": one_of_ten(captions, unseen, trained, fields)
            for name, fields in forms.items()
        },
        "one_of_ten_unseen_in_a_style_trained_on": one_of_ten(captions, known, trained),
        "cats": cats(captions, engine, [r for r in new if not r["unseen"]]),
        "photographs": stamps(captions, engine, 20 if few else 100),
    }
    for name in ("seen_names", "unseen_names", "photographs"):
        print(f"{name}: the right picture is worth {found[name]['difference']:.2f} nats a token")
    tens = {name: found[name] for name in found if name.startswith("one_of_ten")}
    for name, ten in (tens | {"photographs": found["photographs"]["one_of_ten"]}).items():
        shares = ", ".join(f"{k.removesuffix('_by_loop')} {v[-1]:.0%} (one loop {v[0]:.0%})"
                           for k, v in ten.items() if k.endswith("_by_loop"))  # fmt: skip
        print(f"one caption of ten, {name}: {shares}")
    says = found["cats"]
    print(f"'cat' said of {says['cat_said_of_cats']:.0%} of the cats and "
          f"{says['cat_said_of_others']:.0%} of the others")  # fmt: skip
    if not few:
        settings = {"seed": SEED, "styles_never_trained_on": list(TEST)}
        write("pictures.run", __doc__.splitlines()[0], rows(found), settings=settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
