"""What a model says when it is given a text, as recognisers hear it, by loops.

    python -m benchmarks.speaking.run --model FOLDER [--check]

Digits are other strings than those of the training, and sentences other sentences of its words.
pocketsphinx judges: digits with a grammar, sentences with its own model of English. The control is
the speech of another text, and the length of each speech is compared with that of the recording.
The model of sound that ships with the package hears the same speech. With the model's own exits,
loops and confidence are kept by the kind of a token. `--check` takes few texts and leaves no
record.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from benchmarks.common.codecs import writer_settings
from benchmarks.common.kinds import by_kind
from benchmarks.common.record import finish
from benchmarks.speaking.judge import SETS, listener, records_of, word_error_rate
from looptx_core.checkpoint.folder import LoadedModel, load_model
from looptx_core.checkpoint.registry import bundled_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.engine import Engine, Generation, MediaPrompt
from looptx_core.generation.request import Step
from looptx_core.media.audio.read import item_of
from looptx_core.media.audio.speak import Speaking

COUNT = 15
"""Texts of each set."""


def engine_of(loaded: LoadedModel) -> Engine:
    return Engine(loaded.model, loaded.tokenizer, loaded.exit)


def speak(engine: Engine, texts: list[str], options: GenerationOptions) -> list[Generation]:
    return engine.complete([MediaPrompt(text, write="audio") for text in texts], options)


def samples(result: Generation) -> np.ndarray:
    """(n,), at 16 kHz; a tenth of a second of silence where it did not end."""
    if not result.outputs:
        return np.zeros(1600, np.float32)
    return np.asarray(soundfile.read(io.BytesIO(result.outputs[0].content), dtype="float32")[0])


def ours(texts: list[str], sounds: list[np.ndarray]) -> float:
    """The word error rate of the bundled model that hears."""
    loaded = load_model(bundled_model("sound-model"))
    prompts = [MediaPrompt("", (item_of(sound),)) for sound in sounds]
    options = GenerationOptions(temperature=0, max_new_tokens=60)
    heard = iter(engine_of(loaded).complete(prompts, options))
    return word_error_rate(texts, sounds, lambda _: next(heard).text)


def judged(
    engine: Engine, name: str, count: int, options: GenerationOptions
) -> list[dict[str, Any]]:
    records, hear = records_of(name, count), listener(name)
    texts, deepest, rows = [r["text"] for r in records], engine.model.config.max_loops, []
    for loops in (*(n for n in (1, 2, 4) if n < deepest), deepest, "auto"):
        own = GenerationOptions(**{**vars(options), "loops": loops})
        began = time.perf_counter()
        results = speak(engine, texts, own)
        seconds = time.perf_counter() - began
        sounds = [samples(result) for result in results]
        ratios = [len(sound) / len(r["samples"]) for sound, r in zip(sounds, records)]
        row = {
            "set": name,
            "loops": loops,
            "mean_loops": statistics.mean(result.mean_loops for result in results),
            "word_error_rate": word_error_rate(texts, sounds, hear),
            "unfinished": sum(not result.outputs for result in results),
            "length_ratio": statistics.median(ratios),
            "seconds_a_second": seconds / (sum(map(len, sounds)) / 16_000),
        }
        if loops == deepest:
            row["of_another_text"] = word_error_rate(texts, sounds[1:] + sounds[:1], hear)
            row["by_our_recogniser"] = ours(texts, sounds)
            row["recordings_by_our_recogniser"] = ours(texts, [r["samples"] for r in records])
        rows.append(row)
        print(row, flush=True)
        if loops == "auto":
            kinds = codes_by_kind(results, engine.writers["audio"])
            rows += [{"set": name, **each} for each in kinds]
            print(*kinds, sep="\n", flush=True)
    return rows


def codes_by_kind(results: list[Generation], writer: Speaking) -> list[dict[str, Any]]:
    """Mean loops and confidence of tokens of the text, of the first code after each, of the other
    codes, and of what ends a token's sound."""
    kinds: dict[str, list[Step]] = {
        "token of the text": [], "first code": [], "other codes": [], "end of a sound": [],
    }  # fmt: skip
    for result in results:
        begins = False
        for step in result.tokens:
            if step.id in writer.code_ids:
                kinds["first code" if begins else "other codes"].append(step)
                begins = False
            else:
                begins = step.id != writer.closes
                kinds["token of the text" if begins else "end of a sound"].append(step)
    return by_kind(kinds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--draw-steps", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.4)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    options = GenerationOptions(
        temperature=arguments.temperature, draw_steps=arguments.draw_steps, max_new_tokens=800
    )
    engine, count = engine_of(loaded), 4 if arguments.check else COUNT
    rows = [row for name in SETS for row in judged(engine, name, count, options)]
    return finish(
        "speaking.run", __doc__.splitlines()[0], rows, arguments.check,
        texts=count, temperature=options.temperature, draw_steps=options.draw_steps,
        **writer_settings(loaded),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
