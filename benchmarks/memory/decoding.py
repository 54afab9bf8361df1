"""What does a memory cost while decoding on the CPU?

The presets `nano` and `small` with fresh weights, with a memory and without, greedy, batch 1. A
window holds 128 tokens and a block 64. The model with a memory has read four blocks, the one
without has read one, so that both attend to as many tokens; each then decodes a block, at the end
of which the memory folds the one that leaves its window. Sides alternate, rounds apart, and times
are CPU time, so that they hold on a shared machine; read the ratios.

    python -m benchmarks.memory.decoding [--presets nano small] [--rounds 9] [--check]

Three minutes on a core of one's own. A preset that is measured anew replaces its rows in the
record, others stay. `--check` measures one round of `nano` and leaves no record.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch

from benchmarks.common.record import results_file, rows_so_far, write
from benchmarks.decode_speed.run import engine_of
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import get_preset
from looptx_core.generation.engine import Engine

LOOPS = {"nano": 10, "small": 2}
SIDES = ("none", "delta", "infini")
WEIGHTS = ("float32", "bf16", "int8", "ternary")
WINDOW, BLOCK = 128, 64


def seconds_a_token(engine: Engine, loops: int) -> float:
    """CPU seconds for each token of a block, its folding included."""
    config = engine.model.config
    length = 4 * BLOCK if config.has_memory else BLOCK
    ids = torch.randint(1, config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    options = GenerationOptions(
        loops=loops, temperature=0, max_new_tokens=BLOCK + 1, ignore_eos=True
    )
    steps = engine.generate([ids.tolist()], options)
    next(steps)  # the prompt's
    began = time.process_time()
    count = sum(1 for _ in steps)
    assert count == BLOCK
    return (time.process_time() - began) / count


def measure(preset: str, weights: str, rounds: int) -> list[dict[str, object]]:
    shape = {"vocab_size": 4096, **get_preset(preset)["model"]}
    config = ModelConfig(**shape, memory_window=WINDOW, memory_block=BLOCK)
    engines = {side: engine_of(replace(config, memory=side), weights) for side in SIDES}
    assert all(engine.kernel.startswith("native") for engine in engines.values())
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        for side, engine in engines.items():
            seconds = seconds_a_token(engine, LOOPS[preset])
            if number:  # the first round warms up
                found[side].append(seconds)
    return [
        {
            "preset": preset, "loops": LOOPS[preset], "weights": weights, "memory": side,
            "tokens_per_cpu_second": round(1 / statistics.median(times), 1),
            "ratio_of_times": round(statistics.median(
                own / plain for own, plain in zip(times, found["none"])), 3),
            "microseconds_a_token": [round(1e6 * each) for each in times],
        }
        for side, times in found.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--check", action="store_true", help="One round of nano, and no record.")
    args = parser.parse_args()
    if args.check:
        args.presets, args.rounds = ["nano"], 1
    rows = []
    for preset in args.presets:
        for weights in WEIGHTS:
            rows += measure(preset, weights, args.rounds)
            for row in rows[-len(SIDES) :]:
                print({key: row[key] for key in list(row)[:-1]}, flush=True)
    if not args.check:
        earlier = rows_so_far(results_file("memory.decoding"))
        rows = [*(row for row in earlier if row["preset"] not in args.presets), *rows]
        write("memory.decoding", "decoding by the CPU kernel with a memory and without", rows,
              settings={"window": WINDOW, "block": BLOCK})  # fmt: skip


if __name__ == "__main__":
    main()
