"""Who hears what was spoken: pocketsphinx, which has nothing of this project.

pip install pocketsphinx==5.1.1
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.sound.data import DIGITS
from benchmarks.sound.run import errors
from benchmarks.speaking.data import FOLDER
from looptx_core.media.audio.read import samples_of

_GRAMMAR = f"#JSGF V1.0; grammar digits; public <digits> = ({' | '.join(DIGITS)})+ ;"
SETS = ("digits", "sentences")

Hear = Callable[[np.ndarray], str]
"""(samples at 16 kHz, (n,)) -> text."""


def listener(name: str) -> Hear:
    """pocketsphinx for a set: by a grammar of digits, or by its own model of English."""
    from pocketsphinx import Decoder

    decoder = Decoder(loglevel="FATAL")
    if name == "digits":
        decoder.add_jsgf_string("digits", _GRAMMAR)
        decoder.activate_search("digits")

    def hear(samples: np.ndarray) -> str:
        loudest = max(float(np.abs(samples).max()), 1e-6)
        decoder.start_utt()
        decoder.process_raw((samples / loudest * 22_000).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return "" if found is None else str(found.hypstr)

    return hear


def records_of(name: str, count: int) -> list[dict[str, Any]]:
    """The first records of a set, each with its `samples`."""
    lines = (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()[:count]
    found = [json.loads(line) for line in lines]
    return [r | {"samples": samples_of(FOLDER / r["audio"], r["audio"], 60.0)} for r in found]


def word_error_rate(texts: Sequence[str], sounds: Sequence[np.ndarray], hear: Hear) -> float:
    wrong = sum(errors(text, hear(sound)) for text, sound in zip(texts, sounds))
    return wrong / sum(len(text.split()) for text in texts)
