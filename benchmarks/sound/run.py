"""What a model hears: digits by voice, single words, a person on the telephone, silence, and time.

    python -m benchmarks.sound.run [--model FOLDER] [--check] [--only PART ...] [--variant NAME]

The recordings are those of `python -m benchmarks.sound.data test`; nothing of them was trained on,
unless the model learned from `asterisk-train.jsonl`, whose voice is that of `asterisk` and of the
person who says digits. Every part is heard at a few depths, and with controls that a model which
hears must fail: the 10 ms frames of each recording shuffled, the recording before instead of it,
and silence. `--check` takes few recordings and leaves no record.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.record import write
from benchmarks.sound.voices import FOLDER
from looptx_core.checkpoint.folder import LoadedModel, load_model
from looptx_core.checkpoint.registry import bundled_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.engine import Engine, MediaPrompt
from looptx_core.generation.request import Generation
from looptx_core.media.audio.augment import noise
from looptx_core.media.audio.features import FRAMES, MELS, RATE, STEP, log_mels
from looptx_core.media.audio.read import item_of
from looptx_core.media.base import Encoded
from looptx_core.media.batch import MediaItem, batch_items
from looptx_core.media.registry import MEDIA

SEED = 0
PARTS = ("digits", "words", "asterisk", "nothing", "time")
NOTHINGS = 40
"""Recordings in which nothing is said."""


def errors(said: str, heard: str) -> int:
    """Words to replace, insert and delete, by the shortest way."""
    ours, theirs = said.split(), heard.split()
    row = list(range(len(theirs) + 1))
    for i, word in enumerate(ours, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(theirs, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1]


class Listener:
    """A model with its engine, and the recordings of a set."""

    def __init__(self, folder: Path) -> None:
        self.loaded: LoadedModel = load_model(folder)
        loaded = self.loaded
        self.engine = Engine(loaded.model, loaded.tokenizer, loaded.exit)
        most = loaded.config.max_loops
        self.depths = [loops for loops in (1, 2, 4) if loops < most] + [most]

    def item(self, record: dict[str, Any]) -> MediaItem:
        return MEDIA["audio"].read(FOLDER / record["audio"], self.loaded.config)

    def hear(self, items: Sequence[MediaItem], loops: int | None = None) -> list[Generation]:
        """Greedily, each at this depth, or as deep as the model's own rule says."""
        options = GenerationOptions(
            temperature=0, max_new_tokens=100, loops="auto" if loops is None else loops
        )
        return self.engine.complete([MediaPrompt("", (item,)) for item in items], options)


def records_of(name: str, few: bool) -> list[dict[str, Any]]:
    lines = (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in (lines[:: max(1, len(lines) // 12)] if few else lines)]


def shuffled(item: MediaItem) -> MediaItem:
    """With its 10 ms frames in another order."""
    frames = item.features.reshape(-1, MELS)
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(SEED))
    return item._replace(features=frames[order].reshape(-1, FRAMES * MELS))


def silent(item: MediaItem) -> MediaItem:
    """As long, with nothing in it."""
    return item._replace(features=log_mels(torch.zeros(STEP * len(item.features))))


def word_error_rate(records: Sequence[dict[str, Any]], found: Sequence[Generation]) -> float:
    wrong = sum(errors(record["text"], one.text) for record, one in zip(records, found))
    return wrong / sum(len(record["text"].split()) for record in records)


def transcripts(listener: Listener, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Word error rates: by depth, by voice, and of the controls."""
    items = [listener.item(record) for record in records]
    rows: list[dict[str, Any]] = []
    for loops in (*listener.depths, None):
        found = listener.hear(items, loops)
        rows.append({
            "loops": loops or "auto",
            "word_error_rate": word_error_rate(records, found),
            **(loops_by_token(found) if loops is None else {}),
        })  # fmt: skip
        if loops is None:
            rows += by_voice(records, found)
            rows += [
                {"example": record["audio"], "said": record["text"], "heard": one.text}
                for record, one in list(zip(records, found))[:: max(1, len(records) // 12)]
            ]
    controls: dict[str, list[MediaItem]] = {
        "frames shuffled": [shuffled(item) for item in items],
        "the recording before": items[-1:] + items[:-1],
        "silence": [silent(item) for item in items],
    }
    for name, others in controls.items():
        rate = word_error_rate(records, listener.hear(others))
        rows.append({"control": name, "word_error_rate": rate})
    return rows


def by_voice(
    records: Sequence[dict[str, Any]], found: Sequence[Generation]
) -> list[dict[str, Any]]:
    rows = []
    for voice in dict.fromkeys(record.get("group") for record in records):
        own = [(r, one) for r, one in zip(records, found) if r.get("group") == voice]
        if voice is not None:
            rate = word_error_rate(*zip(*own))
            rows.append({"voice": voice, "strings": len(own), "word_error_rate": rate})
    return rows


def loops_by_token(found: Sequence[Generation]) -> dict[str, float]:
    """Mean loops of tokens that begin a word, go on with one, and end the text."""
    kinds: dict[str, list[int]] = {"begin": [], "inside": [], "end": []}
    for generation in found:
        for place, step in enumerate(generation.tokens):
            begins = place == 0 or step.text.startswith(" ")
            kind = "end" if not step.text else "begin" if begins else "inside"
            kinds[kind].append(step.loops)
    return {f"loops_{kind}": statistics.mean(each) for kind, each in kinds.items() if each}


def ranked_words(listener: Listener, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How often the word that is said is the first of all, by log p(word | sound) - log p(word).

    log p(word) is of the text alone, or of the word's mean probability beside all recordings.
    """
    words = [record["text"] for record in records]
    right = torch.arange(len(words))
    rows = []
    alone = losses(listener, None, words)  # (loops, words)
    items = [listener.item(record) for record in records]

    def costs(heard: Sequence[MediaItem]) -> torch.Tensor:
        """(loops, recordings, words)"""
        return torch.stack([losses(listener, item, words) for item in heard], 1)

    def ranks(cost: torch.Tensor) -> dict[str, torch.Tensor]:
        """How often each recording's own word is first, by loop, for three ways to rank."""
        usual = -torch.logsumexp(-cost, 1, keepdim=True)
        ways = {"no sound": alone[:, None] - cost, "other sounds": usual - cost,
                "nothing": -cost}  # fmt: skip
        return {way: (score.argmax(-1) == right).double().mean(-1) for way, score in ways.items()}

    own = costs(items)
    for way, share in ranks(own).items():
        for loops in listener.depths:
            rows.append({"less": way, "loops": loops, "first": float(share[loops - 1])})
    controls = {
        "frames shuffled": costs([shuffled(item) for item in items]),
        "the recording before": own.roll(1, 1),
        "silence": costs([silent(item) for item in items]),
    }
    for name, cost in controls.items():
        rows.append({"control": name, "first": float(ranks(cost)["no sound"][-1])})
    return rows


@torch.no_grad()
def losses(listener: Listener, item: MediaItem | None, texts: Sequence[str]) -> torch.Tensor:
    """Nats of each text in all, its end included, after each loop: (loops, texts)."""
    model, end = listener.loaded.model, 0
    sound = [model.config.audio.token] * (item.length if item else 0)
    rows = [[end, *sound, *listener.loaded.tokenizer.encode(text).ids, end] for text in texts]
    tokens = torch.full((len(rows), max(map(len, rows))), end)
    counted = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        counted[row, len(sound) + 1 : len(ids)] = True
    inputs, targets, counted = tokens[:, :-1], tokens[:, 1:], counted[:, 1:]
    encoded = model.encode(batch_items([item]) if item else None)  # once for all texts
    encoded = {name: Encoded(read.vectors.repeat(len(rows), 1)) for name, read in encoded.items()}
    layout = model.layout(inputs, batch_items([item] * len(rows)) if item else {})
    ctx = model.context(inputs.shape[1], layout=layout)
    start, found = model.embed(inputs, ctx, encoded=encoded), []
    for _, state in model.iterate(start, start, ctx, range(1, listener.depths[-1] + 1)):
        predicted = model.head(model.coda_hidden(state, ctx)[counted])
        each = torch.nn.functional.cross_entropy(predicted, targets[counted], reduction="none")
        sums = torch.zeros(len(rows), dtype=torch.float64)
        found.append(sums.index_add_(0, counted.nonzero()[:, 0], each.double()))
    return torch.stack(found)


def nothing_said(listener: Listener) -> list[dict[str, Any]]:
    """How often silence and noise, of one to six seconds, give a text that is empty."""
    draw = np.random.default_rng(SEED)
    rows = []
    kinds: dict[str, Callable[[int], np.ndarray]] = {
        "silence": lambda count: np.zeros(count, np.float32),
        "noise": lambda count: noise(count, draw) * np.float32(10 ** draw.uniform(-3, -0.5)),
    }
    for kind, make in kinds.items():
        items = [item_of(make(int(draw.integers(RATE, 6 * RATE)))) for _ in range(NOTHINGS)]
        found = listener.hear(items)
        empty = sum(not one.text.strip() for one in found) / len(found)
        said = [one.text for one in found if one.text.strip()][:5]
        rows.append({"kind": kind, "recordings": len(items), "empty": empty, "instead": said})
    return rows


def times(listener: Listener, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds for a second of sound, one recording after the other, reading the file included."""
    listener.hear([listener.item(records[0])])  # what is made once
    seconds = 0.0
    begun, cpu = time.perf_counter(), time.process_time()
    for record in records:
        item = listener.item(record)
        seconds += item.length * STEP / RATE
        listener.hear([item])
    took, busy = time.perf_counter() - begun, time.process_time() - cpu
    return [{
        "recordings": len(records),
        "seconds_of_sound": seconds,
        "real_time_factor": took / seconds,
        "processor_time_factor": busy / seconds,
    }]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=bundled_model("sound-model"))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--variant", default="", help="Of the record, for another model.")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    listener, few = Listener(arguments.model), arguments.check
    digits = records_of("digits", few)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "digits": lambda: transcripts(listener, digits),
        "words": lambda: ranked_words(listener, records_of("words-test", few)),
        "asterisk": lambda: transcripts(listener, records_of("asterisk", few)),
        "nothing": lambda: nothing_said(listener),
        "time": lambda: times(listener, digits[:40]),
    }
    rows = []
    for part in arguments.only:
        for row in parts[part]():
            rows.append({"part": part, **row})
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    if not few:
        write("sound.run", __doc__.splitlines()[0], rows,
              variant=arguments.variant, settings={"seed": SEED})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
