"""Does a memory find a passkey in texts far longer than those it was trained on?

A row is filler, and somewhere in it up to four keys of five digits; a token says a digit and where
in which key it stands. At the end they are asked for, place after place, beyond the window. Models
of one shape (a prelude block, a looped block) learn this at a few hundred tokens, with `delta`,
`infini`, `infini` with delta, and with the same window and no memory; then the filler gets longer.
Nothing but its length changes. Filler is a sentence of 24 words again and again, or prose: four
fifths of Moby Dick while training, the last fifth when asked. Reading is timed beside it, in tokens
a second of CPU time, with the bytes that a text's state takes.

    python -m benchmarks.memory.run [--kinds delta infini] [--seeds 0] [--steps 200] [--check]
    python -m benchmarks.memory.run --kinds delta --filler 32768 131072 1048576 --rows 30 30 5
    python -m benchmarks.memory.run --text prose --steps 400 --kinds delta --filler 32768 --rows 30

Resumable: what stands in the record is not repeated. On one core a kind trains in two minutes, and
so many rows take a minute at 32,768 tokens, five at 131,072 and seven at 1,048,576. `--check`
trains three steps and leaves no record.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch

from benchmarks.common.record import results_file, rows_so_far, slug, write
from benchmarks.memory.learning import (
    KINDS,
    NEAR,
    cuttings,
    kept,
    learn,
    options,
    prose,
    read,
    set_gates,
    settings_in,
    settings_of,
    vocabulary,
)
from looptx_core.config.model import ModelConfig
from looptx_core.model.fused import enable_fused
from looptx_core.model.loop import LoopedTransformer

SENTENCE = 24  # words
KEYS, DIGITS = 4, 5
SPAN = 1 + DIGITS  # what opens a key or a question, and five tokens
PLACES = {
    "start": [0.0], "middle": [0.5], "end": [1.0],
    "four": [0.0, 0.25, 0.5, 1.0],  # four keys, of which the first is asked
}  # fmt: skip
"""Where the keys stand, as shares of the filler."""


class Task:
    """Rows with filler of one kind, sentence or prose, and the ids of what is beside its words."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digit = SENTENCE if text == "sentence" else vocabulary()
        self.place = self.digit + KEYS * DIGITS * 10
        self.key = self.place + KEYS * DIGITS
        self.ask = self.key + 1
        self.vocab = self.key + 2

    def filler(
        self, rng: np.random.Generator, rows: int, length: int, held_out: bool = False
    ) -> np.ndarray:
        """Words of a stretch of its own for each row, (rows, length) int32."""
        if self.text == "prose":
            return cuttings(rng, prose()[held_out], rows, length)
        words = np.arange(length + SENTENCE, dtype=np.int32) % SENTENCE
        firsts = rng.integers(SENTENCE, size=rows)
        return np.stack([words[first : first + length] for first in firsts])

    def phrases(self, keys: np.ndarray, digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids that tell keys and ids that ask for them, both (n, SPAN).

        keys: (n,), below `KEYS`. digits: (n, DIGITS), theirs.
        """
        places = keys[:, None] * DIGITS + np.arange(DIGITS)
        told, asked = (np.full((len(keys), SPAN), opens) for opens in (self.key, self.ask))
        told[:, 1:], asked[:, 1:] = self.digit + 10 * places + digits, self.place + places
        return told, asked

    def draw(
        self, rng: np.random.Generator, done: float, rows: int, length: int, window: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What to train on, see `learning.Draw`.

        A row is cut into slots of SPAN tokens. Its last ones ask for one to four keys, which are
        further away than the window, or at first within it.
        """
        if done < NEAR:
            rows, length, window = rows * 2, window, 0
        tokens, weights = self.filler(rng, rows, length), np.zeros((rows, length), np.float32)
        targets, slots = np.zeros((rows, length), np.int64), length // SPAN
        for row in range(rows):
            keys = rng.permutation(KEYS)[: rng.integers(1, KEYS + 1)]
            told, asked = self.phrases(keys, rng.integers(10, size=(len(keys), DIGITS)))
            places = rng.choice(slots - KEYS - window // SPAN, size=len(keys), replace=False)
            asks = slots - 1 - rng.permutation(KEYS)[: len(keys)]
            for number, (place, ask) in enumerate(zip(places * SPAN, asks * SPAN)):
                tokens[row, place : place + SPAN] = told[number]
                tokens[row, ask : ask + SPAN] = asked[number]
                targets[row, ask : ask + SPAN] = told[number]
                weights[row, ask + 1 : ask + SPAN] = 1
        return torch.from_numpy(tokens).long(), torch.from_numpy(targets), torch.from_numpy(weights)

    @torch.inference_mode()
    def accuracy(
        self, model: LoopedTransformer, length: int, places: list[str], rows: int, seed: int
    ) -> dict[str, dict[str, float]]:
        """The share of digits that are right after a filler of this length, and how it was read.

        places: of `PLACES`. rows: texts for each of them; all are read together.
        """
        rng = np.random.default_rng((seed, 2, length))
        count = rows * len(places)
        tokens = self.filler(rng, count, length, held_out=True)
        keys = rng.permuted(np.tile(np.arange(KEYS), (count, 1)), axis=1)
        digits = rng.integers(10, size=(count, KEYS, DIGITS))
        # The last place is at the end, and yet beyond the window.
        last = length - 2 * model.config.memory_window - SPAN
        for index, place in enumerate(places):
            own = slice(index * rows, (index + 1) * rows)
            for number, share in enumerate(PLACES[place]):
                first = round(share * last)
                told, _ = self.phrases(keys[own, number], digits[own, number])
                tokens[own, first : first + SPAN] = told
        cache = model.new_cache(count, length + SPAN, model.config.loops)
        seconds = read(model, torch.from_numpy(tokens), cache, model.config.loops)
        told, asked = map(torch.from_numpy, self.phrases(keys[:, 0], digits[:, 0]))
        logits = model(asked, cache=cache).logits[:, 1:, self.digit : self.place]
        right = logits.argmax(-1) + self.digit == told[:, 1:]
        shares = right.float().view(len(places), -1).mean(1).tolist()
        facts = {
            "tokens_per_cpu_second": round(count * length / seconds),
            "state_bytes": cache.nbytes // count,
        }
        return {p: {"accuracy": round(share, 4), **facts} for p, share in zip(places, shares)}


def build(kind: str, seed: int, task: Task, args: argparse.Namespace) -> LoopedTransformer:
    torch.manual_seed(seed)
    model = LoopedTransformer(ModelConfig(
        vocab_size=task.vocab, d_model=args.width, n_heads=2, n_kv_heads=2,
        head_dim=args.width // 2, d_ff=2 * args.width, prelude_layers=1, core_layers=1,
        coda_layers=0, max_loops=args.loops, loops=args.loops, memory_window=args.window,
        memory_block=args.block, **KINDS[kind],
    ))  # fmt: skip
    set_gates(model, kind)
    return model


def parser() -> argparse.ArgumentParser:
    made = options(steps=200, batch=16, length=256, lr=2e-2, width=64, loops=2, window=64, block=32)
    made.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    made.add_argument("--text", choices=["sentence", "prose"], default="sentence")
    made.add_argument("--filler", nargs="+", type=int, default=[1024, 32_768])
    made.add_argument("--rows", nargs="+", type=int, default=[30, 30])
    return made


def main() -> None:
    args = parser().parse_args()
    if args.check:
        args.steps, args.filler, args.rows, args.models = 3, [1024], [2], None
    print(f"kernels: {enable_fused()}", flush=True)
    settings = settings_in(args, "kinds", "filler", "rows")
    task, variant = Task(args.text), "" if args.text == "sentence" else args.text
    rows = [] if args.check else rows_so_far(results_file("memory.run", variant))
    done = {(row["kind"], row["seed"], row["filler"], row["place"]) for row in rows}
    for seed in args.seeds:
        for kind in args.kinds:
            todo = {
                length: (count, places)
                for length, count in zip(args.filler, args.rows, strict=True)
                if (places := [p for p in PLACES if (kind, seed, length, p) not in done])
            }
            if not todo:
                continue
            name = f"{slug(kind)}-{args.text}-{seed}-{args.steps}"
            model = build(kind, seed, task, args)
            draw = partial(task.draw, rows=args.batch, length=args.length, window=args.window)
            own = settings_of(args.steps, args.batch, args.lr, seed)
            learned = kept(args.models, name, model, partial(learn, model, draw, own, kind))
            for length, (count, places) in todo.items():
                found = task.accuracy(learned.model, length, places, count, seed)
                for place, values in found.items():
                    print(f"{kind}, seed {seed}, {length:,} at the {place}: {values}", flush=True)
                    rows.append({
                        "kind": kind, "seed": seed, "filler": length, "place": place,
                        "texts": count, **values, "loss": round(learned.loss, 4),
                        "training_seconds": round(learned.seconds),
                    })  # fmt: skip
                if not args.check:
                    write("memory.run", "passkeys after fillers longer than the training's", rows,
                          variant=variant, settings=settings)  # fmt: skip


if __name__ == "__main__":
    main()
