"""Emoji with their names in several styles: the pairs for the benchmark of pictures.

    python benchmarks/emoji.py

writes `benchmarks/.data/emoji/train.jsonl`, of names that are not held out in the four styles to
train on, and `all.jsonl`, each picture with `style`, `group` and `unseen`. Skin tones, genders
and directions of one emoji make one group, which is held out whole or not at all.

Styles to train on: Noto of today (npm emoji-datasource-google 16.0.0) and the blobs of old (4.0.4),
both Apache-2.0; Fluent 3D (@lobehub/fluent-emoji-3d 1.1.0, MIT); Twemoji (emoji-datasource-twitter
16.0.0, CC BY 4.0). To test on, never to train on or to ship: Facebook's and Apple's.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from corpora import DATA

FOLDER = DATA / "emoji"
# Style: package, folder of its pictures, whether to train on it.
STYLES = {
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/", True),
    "blob": ("emoji-datasource-google@4.0.4", "package/img/google/64/", True),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/", True),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/", True),
    "facebook": ("emoji-datasource-facebook@16.0.0", "package/img/facebook/64/", False),
    "apple": ("emoji-datasource-apple@16.0.0", "package/img/apple/64/", False),
}
UNSEEN = 0.1
_TONES = r"-1f3f[b-f]"
_GENDER = r"-200d-264[02]|-200d-27a1"
_PERSON = r"1f46[6-9]|1f9d[1-2]"


def group_of(code: str) -> str:
    """What skin tones, genders and directions of one emoji have in common."""
    code = re.sub(rf"{_TONES}|{_GENDER}|-fe0f", "", code.lower())
    return re.sub(_PERSON, "person", code)


def is_unseen(group: str) -> bool:
    return int(hashlib.sha256(f"emoji:{group}".encode()).hexdigest()[:8], 16) / 2**32 < UNSEEN


def fetch_emoji() -> Path:
    """The folder with the two files; made when absent."""
    if (FOLDER / "train.jsonl").exists():
        return FOLDER
    names: dict[str, str] = {}
    records = []
    for style, (package, inside, train) in STYLES.items():
        for name, data in _members(package):
            if name == "package/emoji.json" and not names:
                for entry in json.loads(data):
                    names[Path(entry["image"]).stem.lower()] = entry["name"].lower()
            elif name.startswith(inside) and name.endswith((".png", ".webp")):
                code = Path(name).stem.lower()
                if code not in names:
                    continue  # a skin tone, or one that has no name of its own
                file = FOLDER / style / f"{code}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
                picture = Image.open(file).convert("RGBA")
                picture.resize((64, 64), Image.Resampling.LANCZOS).save(file)
                group = group_of(code)
                facts = {"style": style, "group": group, "unseen": is_unseen(group)}
                pair = {"image": f"{style}/{code}.png", "text": names[code]}
                records.append({**pair, **facts, "train": train and not facts["unseen"]})
    for file, chosen in (("all", records), ("train", [r for r in records if r["train"]])):
        text = "".join(json.dumps(record) + "\n" for record in chosen)
        (FOLDER / f"{file}.jsonl").write_text(text, "utf-8")
    return FOLDER


def _members(package: str) -> Iterator[tuple[str, bytes]]:
    """emoji.json, then the pictures of an npm package."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            ["npm", "pack", package, "--pack-destination", scratch, "--silent"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as tar:
            wanted = [m for m in tar if m.isfile() and "/sheets" not in m.name]
            for member in sorted(wanted, key=lambda m: m.name != "package/emoji.json"):
                if data := tar.extractfile(member):
                    yield member.name, data.read()


if __name__ == "__main__":
    folder = fetch_emoji()
    for file in ("train", "all"):
        lines = (folder / f"{file}.jsonl").read_text("utf-8").splitlines()
        print(f"{folder / file}.jsonl: {len(lines)} pictures")
