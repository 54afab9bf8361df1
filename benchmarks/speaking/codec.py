"""What a codec of speech keeps, as a recogniser hears it, by loops and steps of diffusion.

    python -m benchmarks.speaking.data
    looptx tokenize --codec speech benchmarks/.data/speaking/train.jsonl \
        --out benchmarks/.data/speaking/codec --steps 700 --batch-size 24 \
        --set codec_model.width=128 --set codec_model.max_loops=3 \
        --set codec_model.encoder_layers=3
    python -m benchmarks.speaking.codec [--codec FOLDER] [--check]

Judged by pocketsphinx on what the codec never heard: strings of digits with a grammar, sentences
with its own model of English. Controls are the recordings as they are, their log-mels by
Griffin-Lim without a codec, and for digits codes drawn at random. `--check` takes few recordings
and leaves no record.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.codecs import codec_settings
from benchmarks.common.record import finish
from benchmarks.speaking.data import FOLDER
from benchmarks.speaking.judge import SETS, listener, records_of, word_error_rate
from looptx_core.checkpoint.codec_folder import load_codec, read_facts
from looptx_core.media.audio.coded import frames_of, grid_of, to_frames, to_patches
from looptx_core.media.audio.vocoder import to_sound
from looptx_core.media.codec.codec import Codec

SEED = 0
COUNT = 30
"""Recordings of each set."""


def through(
    codec: Codec, samples: np.ndarray, steps: int, loops: int, is_random: bool = False
) -> np.ndarray:
    """A recording as codes and back."""
    patches = to_patches(frames_of(torch.from_numpy(samples)), codec.config)
    grid = grid_of(patches, codec.config)
    codes = codec.encode(patches[None], grid)
    if is_random:
        draw = torch.Generator().manual_seed(SEED)
        codes = torch.randint(0, codec.config.codes, codes.shape, generator=draw)
    found = codec.decode(codes, grid, steps=steps, loops=loops, seed=SEED)
    return to_sound(to_frames(found[0], codec.config), SEED)


def judged(codec: Codec, name: str, count: int) -> list[dict[str, Any]]:
    records, hear = records_of(name, count), listener(name)
    texts, spoken = [r["text"] for r in records], [r["samples"] for r in records]
    deepest, rows = codec.config.max_loops, []

    def add(what: str, sounds: list[np.ndarray], **more: Any) -> None:
        rate = word_error_rate(texts, sounds, hear)
        rows.append({"set": name, "what": what, **more, "word_error_rate": rate})
        print(rows[-1], flush=True)

    add("as spoken", spoken)
    add("log-mels and Griffin-Lim", [to_sound(frames_of(torch.from_numpy(s)), SEED)
                                     for s in spoken])  # fmt: skip
    for steps, loops in (*((1, loop) for loop in range(1, deepest + 1)), (8, deepest)):
        sounds = [through(codec, one, steps, loops) for one in spoken]
        add("codec", sounds, steps=steps, loops=loops)
    if name == "digits":  # without a grammar, noise is searched for minutes
        add("codes at random", [through(codec, one, 1, deepest, True) for one in spoken])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", type=Path, default=FOLDER / "codec")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    codec, fingerprint = load_codec(arguments.codec)
    count = 4 if arguments.check else COUNT
    rows = [row for name in SETS for row in judged(codec, name, count)]
    facts = read_facts(arguments.codec)
    return finish(
        "speaking.codec", __doc__.splitlines()[0], rows, arguments.check,
        bits_a_second=facts.get("bits"), codes_used=facts.get("codes_used"),
        mel_error_1_step=facts["mel_error"]["1"] if "mel_error" in facts else None,
        recordings=count, **codec_settings(codec, fingerprint, arguments.codec),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
