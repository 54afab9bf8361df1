"""Recordings with their texts: what the model that hears is trained on, and what it is tested on.

    pip install onnxruntime==1.32.0
    python -m benchmarks.sound.data [train] [test] [sample]

writes into `benchmarks/.data/sound`:
- `train.jsonl`, `words.jsonl`: what `voices.py` says, and the texts alone for a tokenizer. Digits,
  words and short sentences; each clip is a function of its kind and number, so that a build that
  was cut off goes on. Kokoro's clips are listed several times, since the natural voices matter
  most and cost most.
- `digits.jsonl`: strings of five digits by voices that are never trained on: Kokoro's `HELD_OUT`,
  and a person's, her single digits one after another.
- `words-test.jsonl`: 72 single words by another person (KDE's game of faces).
- `asterisk.jsonl`, `asterisk-train.jsonl`: one person's sentences over the telephone; the texts of
  the first are held out by their hash. `telephone.jsonl`: the second, four times, among `train`.

Licences: `voices.py` has those of the voices. The recordings of Debian's `ktuberling-data` are
GPL-2+, those of `asterisk-core-sounds-en` CC BY-SA 3.0: nothing that ships was trained on either.
Sentences are of the bundled *Moby Dick*, in the public domain.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.record import ROOT
from benchmarks.sound.voices import (
    ESPEAK_ACCENTS,
    ESPEAK_SPEAKERS,
    FLITE,
    FOLDER,
    HELD_OUT,
    RATE,
    Kokoro,
    debian,
    espeak,
    flite,
)
from looptx_core.checkpoint.registry import bundled_model

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLIPS = {"kokoro": 279, "flite": 1029, "espeak": 1746}
"""Recordings to train on by synthesiser."""
TIMES = {"kokoro": 10, "flite": 1, "espeak": 1}
"""How often `train.jsonl` lists each."""
TEXTS = 6000
"""Lines of `words.jsonl`, drawn as what the clips say."""
SEED = 9
LONGEST = 10
"""Seconds of a recording by telephone."""
STRINGS = 12
"""Of five digits, by each voice to test with."""
_HELD_OUT_TEXTS = 0.2
_NAMED = {
    "palmtree": "palm tree", "sphynx": "sphinx", "fallingstar": "falling star",
    "moonwalker": "moon walker", "broccolli": "broccoli",
}  # fmt: skip
_OTHER_WORDS = """
hello hello hello goodbye welcome please thanks yes no okay stop start go left right up down open
close play pause next back on off red orange yellow green blue purple black white brown grey pink
cat dog bird fish horse cow mouse lion tiger bear apple banana cherry grape lemon water coffee
bread butter sugar house door window table chair kitchen garden school street city river mountain
monday tuesday wednesday thursday friday saturday sunday january february march april may june july
august september october november december morning evening night today tomorrow yesterday mary john
peter paul anna emma david sarah michael alice robert susan computer telephone music picture number
letter password world friend mother father brother sister king queen summer winter spring autumn
rain snow wind storm fire ice big small hot cold fast slow happy sad new old good bad
"""
_PHRASES = (
    "hello world", "hello {w}", "good morning {w}", "call me ishmael", "my name is {w}", "call {w}",
    "turn on the {w}", "turn off the {w}", "the {w} is on the {w}", "a {w} and a {w}",
    "where is the {w}", "i like the {w}", "this is a {w}", "open the {w}", "show me the {w}",
    "the number is {d} {d} {d}", "call {d} {d} {d} {d}", "page {d} {d}", "{d} {w} and {d} {w}",
)  # fmt: skip


class Texts:
    """Draws what is said."""

    def __init__(self) -> None:
        self.named = sorted(word for _, word in named_words())
        book = (bundled_model().parent / "moby-dick.txt").read_text("utf-8")
        book = re.sub(r"\s+", " ", book.replace("--", ". "))
        counts = Counter(re.findall(r"[a-z]{3,}", book.lower()))
        self.words = [word for word, _ in counts.most_common(1200)]
        known = {word for word, _ in counts.most_common(4000)} | {"i", "a", "of", "to", "it"}
        self.sentences = [
            spoken
            for sentence in re.split(r"[.!?;:,]", book)
            if 3 <= len((spoken := plain(sentence)).split()) <= 8 and known >= set(spoken.split())
        ]

    def word(self, draw: np.random.Generator) -> str:
        pool = (self.named, _OTHER_WORDS.split(), self.words)[draw.choice(3, p=(0.5, 0.25, 0.25))]
        return str(draw.choice(pool))

    def drawn(self, draw: np.random.Generator) -> str:
        kind = draw.random()
        if kind < 0.45:
            count = draw.choice((1, 2, 3, 4, 5, 6, 7), p=(0.05, 0.05, 0.1, 0.2, 0.35, 0.15, 0.1))
            pause = ", " if draw.random() < 0.2 else " "
            return pause.join(draw.choice(DIGITS, count))
        if kind < 0.7:
            return ", ".join(
                self.word(draw) for _ in range(draw.choice((1, 2, 3), p=(0.5, 0.3, 0.2)))
            )
        if kind < 0.82:
            phrase = str(draw.choice(_PHRASES))
            said = re.sub(r"{w}", lambda _: self.word(draw), phrase)
            return re.sub(r"{d}", lambda _: str(draw.choice(DIGITS)), said)
        return str(draw.choice(self.sentences))


def plain(text: str) -> str:
    """Words in lower case with single spaces, as the model writes them."""
    return " ".join(re.findall(r"[a-z']+", text.lower().replace("-", " ")))


def named_words() -> list[tuple[Path, str]]:
    """Recordings of single words, and the words."""
    found = []
    for file in sorted((debian("ktuberling") / "usr/share/ktuberling/sounds/en").glob("*.ogg")):
        name = file.stem.rpartition("_")[2]
        found.append((file, _NAMED.get(name, name)))
    return found


def asterisk() -> list[tuple[Path, str]]:
    """A person's recordings by telephone, and what she says."""
    import soundfile

    root = debian("asterisk")
    folder = root / "usr/share/asterisk/sounds/en_US_f_Allison"
    lists = root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    found = []
    for line in gzip.decompress(lists.read_bytes()).decode().splitlines():
        name, _, said = line.partition(":")
        file = folder / f"{name.strip()}.wav"
        if line.startswith(";") or said.strip().startswith("[") or not file.is_file():
            continue
        if (text := plain(said)) and soundfile.info(file).duration <= LONGEST:
            found.append((file, text))
    return found


def is_held_out(text: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 < _HELD_OUT_TEXTS


def trimmed(samples: np.ndarray, before: float, after: float) -> np.ndarray:
    """What is said, with so many seconds of the quiet around it at most."""
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    first, last = loud[0] - round(before * RATE), loud[-1] + round(after * RATE)
    return samples[max(0, first) : last]


class Speakers:
    """The synthesisers, each with a voice and a manner drawn for every clip."""

    def __init__(self) -> None:
        self._kokoro: Kokoro | None = None

    @property
    def kokoro_model(self) -> Kokoro:
        self._kokoro = self._kokoro or Kokoro()
        return self._kokoro

    def kokoro(self, text: str, draw: np.random.Generator) -> np.ndarray:
        """A voice, or a mixture of two; the voices of other languages speak with an accent."""
        model = self.kokoro_model
        heard = [voice for voice in model.voices if voice not in HELD_OUT]
        english = [voice for voice in heard if voice[0] in "ab"]
        first = str(draw.choice(english if draw.random() < 0.75 else heard))
        second = str(draw.choice(english))
        share = float(draw.choice((1.0, draw.uniform(0.4, 0.9))))
        return model.speak(text, (first, second), share, float(draw.uniform(0.9, 1.4)))

    def flite(self, text: str, draw: np.random.Generator) -> np.ndarray:
        hertz = draw.uniform(85, 230)
        return flite(text, str(draw.choice(FLITE)), draw.uniform(0.75, 1.3), hertz)

    def espeak(self, text: str, draw: np.random.Generator) -> np.ndarray:
        voice = f"{draw.choice(ESPEAK_ACCENTS)}+{draw.choice(ESPEAK_SPEAKERS)}"
        return espeak(text, voice, int(draw.integers(115, 220)), int(draw.integers(15, 85)))


def build_train(kinds: Sequence[str] = tuple(CLIPS)) -> None:
    """Speak the clips that are missing."""
    texts, speakers = Texts(), Speakers()
    for kind in kinds:
        speak: Callable[..., np.ndarray] = getattr(speakers, kind)
        for number in range(CLIPS[kind]):
            file = FOLDER / kind / f"{number:05}.wav"
            if not file.exists():
                draw = np.random.default_rng((list(CLIPS).index(kind), number))
                text = texts.drawn(draw)
                margins = draw.uniform(0.02, 0.3, 2)
                save(file, trimmed(speak(text, draw), *margins))


def list_train() -> None:
    """`train.jsonl` of the clips that are there, and `words.jsonl`."""
    texts, lines = Texts(), []
    for kind, count in CLIPS.items():
        for number in range(count):
            if (FOLDER / kind / f"{number:05}.wav").exists():
                draw = np.random.default_rng((list(CLIPS).index(kind), number))
                record = {"audio": f"{kind}/{number:05}.wav", "text": plain(texts.drawn(draw))}
                lines += [record] * TIMES[kind]
    write_lines(FOLDER / "train.jsonl", lines)
    draw = np.random.default_rng(SEED)
    said = ({"text": plain(texts.drawn(draw))} for _ in range(TEXTS))
    write_lines(FOLDER / "words.jsonl", said)


def build_tests() -> None:
    write_lines(FOLDER / "words-test.jsonl", (
        {"audio": str(file.relative_to(FOLDER)), "text": word} for file, word in named_words()
    ))  # fmt: skip
    held, heard = [], []
    for file, text in asterisk():
        record = {"audio": str(file.relative_to(FOLDER)), "text": text}
        (held if is_held_out(text) else heard).append(record)
    write_lines(FOLDER / "asterisk.jsonl", held)
    write_lines(FOLDER / "asterisk-train.jsonl", heard)
    train = FOLDER / "train.jsonl"
    if train.exists():
        others = [json.loads(line) for line in train.read_text("utf-8").splitlines()]
        write_lines(FOLDER / "telephone.jsonl", [*others, *heard * 4])
    write_lines(FOLDER / "digits.jsonl", _digit_strings())


def build_sample() -> None:
    """`examples/hello.wav`, by the one voice to test with of which the model hears these words."""
    sample = ROOT / "looptx_core/assets/samples/hello.wav"
    save(sample, Kokoro().speak("hello world", ("am_onyx",), 1.0, 1.0))


def _digit_strings() -> Iterator[dict[str, Any]]:
    kokoro, draw = None, np.random.default_rng(0)
    strings = [draw.choice(DIGITS, 5) for _ in range(STRINGS * (len(HELD_OUT) + 1))]
    for number, words in enumerate(strings):
        voice = (*HELD_OUT, "a person")[number // STRINGS]
        file = FOLDER / "digits" / f"{voice.replace(' ', '-')}-{number % STRINGS:02}.wav"
        if not file.exists():
            if voice in HELD_OUT:
                kokoro = kokoro or Kokoro()
                save(file, kokoro.speak(" ".join(words), (voice,), 1.0, 1.0))
            else:
                save(file, _in_a_row(words))
        text = " ".join(words)
        yield {"audio": f"digits/{file.name}", "text": text, "group": voice}


def _in_a_row(words: Sequence[str]) -> np.ndarray:
    """A person's digits with a tenth of a second between them."""
    import soundfile
    import soxr

    parts = []
    for word in words:
        name = f"{DIGITS.index(word)}.wav"
        folder = debian("asterisk") / "usr/share/asterisk/sounds/en_US_f_Allison/digits"
        samples, rate = soundfile.read(folder / name, dtype="float32")
        parts.append(trimmed(soxr.resample(samples, rate, RATE), 0.05, 0.05))
    return np.concatenate(parts)


def save(file: Path, samples: np.ndarray) -> None:
    import soundfile

    file.parent.mkdir(parents=True, exist_ok=True)
    loudest = float(np.abs(samples).max())
    part = file.with_suffix(".part")
    soundfile.write(part, samples / max(loudest, 1e-3) * 0.7, RATE, format="WAV", subtype="PCM_16")
    part.rename(file)  # a build that is cut off leaves no half of a file


def write_lines(file: Path, records: Any) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    file.write_text(text, "utf-8")


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["train", "test"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    if "train" in wanted:
        build_train()
    if kinds := [kind for kind in CLIPS if kind in wanted]:
        build_train(kinds)
    if "test" in wanted:
        build_tests()
    if "sample" in wanted:
        build_sample()
    list_train()
