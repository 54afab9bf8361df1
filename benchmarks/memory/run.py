"""Does a memory find a passkey in texts far longer than those it was trained on?

A row is a sentence of 24 words again and again, and somewhere in it up to four keys of five digits,
each digit after a label of its own. At the end they are asked for, beyond the window. Models of one
shape (a prelude block, a looped block) learn this at a few hundred tokens, with `delta`, `infini`,
`infini` with delta, and with the same window and no memory; then the filler gets longer. Nothing
but its length changes. Reading is timed beside it, in tokens a second of CPU time, with the bytes
that a text's state takes.

    python -m benchmarks.memory.run [--kinds delta infini] [--seeds 0] [--steps 200] [--check]
    python -m benchmarks.memory.run --kinds delta --filler 32768 131072 1048576 --rows 30 30 5

Resumable: what stands in the record is not repeated. On one core training takes a minute a kind,
and reading one minute at 32,768, four at 131,072 and five at 1,048,576 with so many rows. `--check`
trains three steps and leaves no record.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model

from benchmarks.common.record import results_file, rows_so_far, slug, write
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.model.block import Block
from looptx_core.model.fused import enable_fused
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss
from looptx_core.training.optimizer import build_optimizer, clip_by_part, learning_rate_factor

WORDS, KEYS, DIGITS = 24, 4, 5
DIGIT, LABEL = WORDS, WORDS + 10
KEY = LABEL + KEYS * DIGITS
ASK, VOCAB = KEY + 1, KEY + 2
SPAN = 1 + 2 * DIGITS  # KEY or ASK, and a label and a digit five times
SLOT = SPAN + 1
KINDS: dict[str, dict[str, Any]] = {
    "delta": {"memory": "delta"},
    "infini": {"memory": "infini"},
    "infini with delta": {"memory": "infini", "infini_delta": True},
    "window alone": {"memory": "infini"},
}
PLACES = {
    "start": [0.0], "middle": [0.5], "end": [1.0],
    "four": [0.0, 0.25, 0.5, 1.0],  # four keys, of which the first is asked
}  # fmt: skip
"""Where the keys stand, as shares of the filler."""


def phrase(opens: int, key: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """(rows, SPAN) tokens: KEY or ASK, then the digits of each row's key after their labels.

    key: (rows,). digits: (rows, DIGITS).
    """
    found = np.empty((len(digits), SPAN), dtype=np.int64)
    found[:, 0] = opens
    found[:, 1::2] = LABEL + key[:, None] * DIGITS + np.arange(DIGITS)
    found[:, 2::2] = DIGIT + digits
    return found


def filler(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """The sentence, from a word of its own in each row, (rows, length) int32."""
    text = np.arange(length + WORDS, dtype=np.int32) % WORDS
    return np.stack([text[first : first + length] for first in rng.integers(WORDS, size=rows)])


def batch(
    rng: np.random.Generator, rows: int, length: int, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to train on, (rows, length + 1), and the weights of their successors, (rows, length).

    The last slots of a row ask for one to four keys, and these are further away than the window.
    """
    tokens = filler(rng, rows, length + 1)
    weights = np.zeros((rows, length), dtype=np.float32)
    slots = length // SLOT
    before = slots - KEYS - window // SLOT
    for row in range(rows):
        keys = rng.permutation(KEYS)[: rng.integers(1, KEYS + 1)]
        digits = rng.integers(10, size=(len(keys), DIGITS))
        places = rng.choice(before, size=len(keys), replace=False)
        asks = slots - 1 - rng.permutation(KEYS)[: len(keys)]
        for slot, spoken in zip(places, phrase(KEY, keys, digits)):
            tokens[row, slot * SLOT : slot * SLOT + SPAN] = spoken
        for slot, spoken in zip(asks, phrase(ASK, keys, digits)):
            tokens[row, slot * SLOT : slot * SLOT + SPAN] = spoken
            weights[row, slot * SLOT + 1 : slot * SLOT + SPAN : 2] = 1
    return torch.from_numpy(tokens).long(), torch.from_numpy(weights)


def shape(kind: str, args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB, d_model=args.width, n_heads=2, n_kv_heads=2, head_dim=args.width // 2,
        d_ff=2 * args.width, prelude_layers=1, core_layers=1, coda_layers=0, max_loops=args.loops,
        loops=args.loops, memory_window=args.window, memory_block=args.block, **KINDS[kind],
    )  # fmt: skip


def build(kind: str, seed: int, args: argparse.Namespace) -> LoopedTransformer:
    torch.manual_seed(seed)
    model = LoopedTransformer(shape(kind, args))
    if kind == "window alone":  # the gate is shut for good
        for block in model.core:
            assert isinstance(block, Block) and block.attention.memory is not None
            block.attention.memory.gate_bias.requires_grad_(False).fill_(-torch.inf)
    return model


def train(kind: str, seed: int, args: argparse.Namespace) -> tuple[LoopedTransformer, float, float]:
    """The model, its last loss in nats a digit, and the CPU seconds that it took."""
    settings = TrainConfig(steps=args.steps, batch_size=args.batch, lr=args.lr, seed=seed,
                           loop_schedule="fixed", loss_at="last", weight_decay=0.0)  # fmt: skip
    model = build(kind, seed, args).train()
    schedule, optimizer = LoopSchedule(settings, args.loops), build_optimizer(model, settings)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(settings))
    rng = np.random.default_rng((seed, 1))
    began, losses = time.process_time(), []
    for step in range(args.steps):
        tokens, weights = batch(rng, args.batch, args.length, args.window)
        loss = loop_loss(
            model, tokens, schedule, step, torch.arange(args.batch),
            weights=weights / weights.mean(), loss_at="last",
        )  # fmt: skip
        optimizer.zero_grad()
        (loss.loss + loss.confidence_loss).backward()
        clip_by_part(model, 1.0)
        optimizer.step()
        rates.step()
        losses.append(float(loss.deepest))
        if step % 50 == 49:
            seconds = time.process_time() - began
            print(f"  {kind} {step + 1}: {np.mean(losses[-50:]):.3f} nats, {seconds:.0f} s",
                  flush=True)  # fmt: skip
    return model.eval(), float(np.mean(losses[-50:])), time.process_time() - began


def trained(
    kind: str, seed: int, args: argparse.Namespace
) -> tuple[LoopedTransformer, float, float]:
    """`train`, or what it made before, where `--models` has a folder for it."""
    if not args.models:
        return train(kind, seed, args)
    file = Path(args.models) / f"{slug(kind)}-{seed}-{args.steps}.safetensors"
    if not file.exists():
        model, loss, seconds = train(kind, seed, args)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, str(file), {"loss": str(loss), "seconds": str(seconds)})
    model = build(kind, seed, args).eval()
    load_model(model, file)
    with safe_open(file, "pt") as stored:
        facts = stored.metadata()
    return model, float(facts["loss"]), float(facts["seconds"])


@torch.inference_mode()
def asked(
    model: LoopedTransformer, length: int, places: list[str], rows: int, seed: int
) -> dict[str, dict[str, float]]:
    """The share of digits that are right after a filler of this length, and how it was read.

    places: of `PLACES`. rows: texts for each of them; all are read together.
    """
    rng = np.random.default_rng((seed, 2, length))
    count = rows * len(places)
    tokens = filler(rng, count, length)
    keys = rng.permuted(np.tile(np.arange(KEYS), (count, 1)), axis=1)
    digits = rng.integers(10, size=(count, KEYS, DIGITS))
    # At the end, and yet beyond the window.
    last = length - 2 * model.config.memory_window - SPAN
    for index, place in enumerate(places):
        own = slice(index * rows, (index + 1) * rows)
        for number, share in enumerate(PLACES[place]):
            first = round(share * last)
            spoken = phrase(KEY, keys[own, number], digits[own, number])
            tokens[own, first : first + SPAN] = spoken
    cache = model.new_cache(count, length + SPAN, model.config.loops)
    began, loops = time.process_time(), range(1, model.config.loops + 1)
    for x, ctx in model.passes(torch.from_numpy(tokens), cache):
        start = model.run_prelude(x, ctx)
        for _ in model.iterate(start, start, ctx, loops):
            pass
        assert ctx.view is not None
        ctx.view.advance()
    seconds = time.process_time() - began
    question = torch.from_numpy(phrase(ASK, keys[:, 0], digits[:, 0]))
    logits = model(question, cache=cache).logits[:, 1::2]
    right = logits[..., DIGIT : DIGIT + 10].argmax(-1) == torch.from_numpy(digits[:, 0])
    shares = right.float().view(len(places), -1).mean(1).tolist()
    read = {
        "tokens_per_cpu_second": round(count * length / seconds),
        "state_bytes": cache.nbytes // count,
    }
    return {place: {"accuracy": round(share, 4), **read} for place, share in zip(places, shares)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--models", help="Keep the trained models in this folder.")
    parser.add_argument("--filler", nargs="+", type=int, default=[1024, 32_768])
    parser.add_argument("--rows", nargs="+", type=int, default=[30, 30])
    parser.add_argument("--check", action="store_true", help="Three steps, and no record.")
    args = parser.parse_args()
    if args.check:
        args.steps, args.filler, args.rows, args.models = 3, [1024], [2], None
    print(f"kernels: {enable_fused()}", flush=True)
    settings = {key: value for key, value in vars(args).items()
                if key not in ("kinds", "seeds", "filler", "rows", "models", "check")}  # fmt: skip
    rows = [] if args.check else rows_so_far(results_file("memory.run"))
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
            model, loss, seconds = trained(kind, seed, args)
            for length, (count, places) in todo.items():
                for place, found in asked(model, length, places, count, seed).items():
                    print(f"{kind}, seed {seed}, {length:,} at the {place}: {found}", flush=True)
                    rows.append({
                        "kind": kind, "seed": seed, "filler": length, "place": place,
                        "texts": count, **found, "loss": round(loss, 4),
                        "training_seconds": round(seconds),
                    })  # fmt: skip
                if not args.check:
                    write("memory.run", "passkeys after fillers longer than the training's", rows,
                          settings=settings)  # fmt: skip


if __name__ == "__main__":
    main()
