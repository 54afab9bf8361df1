"""What one voice says: digits and simple sentences to learn from, and others to test with.

    python -m benchmarks.speaking.data

writes into `benchmarks/.data/speaking`, by flite's voice `slt`:
- `train.jsonl`: strings of one to six digits, sentences, and names of emoji;
- `digits.jsonl`: other strings of five digits;
- `sentences.jsonl`: other sentences, of words that are all in `train.jsonl`;
- `words.jsonl`: texts alone, for a tokenizer.

The voice is made from CMU ARCTIC, which is free for any use; see `benchmarks.sound.voices`.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.common.corpora import DATA
from benchmarks.pictures.emoji import fetch_emoji
from benchmarks.sound.data import DIGITS, save, trimmed, write_lines
from benchmarks.sound.voices import flite

FOLDER = DATA / "speaking"
VOICE, HERTZ = "slt", 170.0
MARGIN = 0.06
"""Seconds of silence around what is said."""
TRAIN = {"digits": 4000, "sentences": 4000, "names": 1200}
"""Texts of one of `ROUNDS`; each has its own draws, so that more of them leave the others."""
ROUNDS = 2
TEST = {"digits": 60, "sentences": 60}
SEED = 3
_THINGS = [
    "cat",
    "dog",
    "bird",
    "horse",
    "mouse",
    "tiger",
    "apple",
    "banana",
    "cherry",
    "lemon",
    "water",
    "coffee",
    "bread",
    "butter",
    "house",
    "door",
    "window",
    "table",
    "chair",
    "kitchen",
    "garden",
    "school",
    "street",
    "city",
    "river",
    "mountain",
    "car",
    "train",
    "letter",
    "book",
    "picture",
]
_ADJECTIVES = [
    "red",
    "yellow",
    "green",
    "blue",
    "black",
    "white",
    "small",
    "big",
    "old",
    "new",
    "good",
    "cold",
]
_PATTERNS = (
    "the {a} {t} is in the {t}", "i like the {a} {t}", "where is the {t}", "this is a {a} {t}",
    "open the {a} {t}", "show me the {t} and the {t}", "good morning", "my {t} is {a}",
    "turn left at the {t}", "we have {d} {t} pictures", "please call me at {d}",
)  # fmt: skip


def digits(draw: np.random.Generator, least: int = 1, most: int = 6) -> str:
    return " ".join(draw.choice(DIGITS, int(draw.integers(least, most + 1))))


@functools.cache
def names() -> list[str]:
    """Names of emoji that are words alone."""
    lines = (fetch_emoji() / "all.jsonl").read_text("utf-8").splitlines()
    every = {json.loads(line)["text"].replace("-", " ").lower() for line in lines}
    return sorted(name for name in every if re.fullmatch(r"[a-z]+( [a-z]+){0,3}", name))


def sentence(draw: np.random.Generator) -> str:
    text = str(draw.choice(_PATTERNS))
    for key, words in (("{a}", _ADJECTIVES), ("{t}", _THINGS), ("{d}", DIGITS)):
        text = re.sub(key, lambda _, words=words: str(draw.choice(words)), text)  # type: ignore[misc]
    return text


SAID = {
    "digits": digits, "sentences": sentence, "names": lambda draw: str(draw.choice(names())),
}  # fmt: skip
"""What draws a text of each kind."""


def texts() -> dict[str, list[tuple[str, str]]]:
    """(kind, text) to train on and to test with; no text is in both."""
    draw = np.random.default_rng(SEED)
    found: dict[str, list[tuple[str, str]]] = {"train": []}
    seen: set[str] = set()
    for name, count in TEST.items():
        own: set[str] = set()
        while len(own) < count:
            text = digits(draw, 5, 5) if name == "digits" else sentence(draw)
            if text not in seen | own:
                own.add(text)
                found.setdefault(name, []).append((name, text))
        seen |= own
    for number in range(ROUNDS):
        draw = draw if number == 0 else np.random.default_rng((SEED, number))
        for kind, count in TRAIN.items():
            drawn = (SAID[kind](draw) for _ in itertools.count())
            unseen = ((kind, text) for text in drawn if text not in seen)
            found["train"] += itertools.islice(unseen, count)
    return found


def records() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record by the file that it belongs to, spoken where it is not there yet."""
    for name, said in texts().items():
        for number, (_, text) in enumerate(said):
            file = FOLDER / name / f"{number:04}.wav"
            if not file.exists():
                spoken = flite(text, VOICE, 1.0, HERTZ)
                save(file, trimmed(spoken, MARGIN, MARGIN))
            yield name, {"audio": f"{name}/{file.name}", "text": text, "group": text}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, some in itertools.groupby(records(), key=lambda each: each[0]):
        write_lines(FOLDER / f"{name}.jsonl", [record for _, record in some])
    draw = np.random.default_rng(SEED + 1)
    spoken = [{"text": say(draw)} for _ in range(2000) for say in SAID.values()]
    write_lines(FOLDER / "words.jsonl", spoken)


if __name__ == "__main__":
    main()
