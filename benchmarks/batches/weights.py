"""Tokens a second of processor time by the number of streams and the type of the weights.

`small` (2 + 4 x 2 + 2), random weights, full depth, prompts of four tokens, the compiled kernel.
The types alternate.

    python -m benchmarks.batches.weights [--new 16] [--rounds 3] [--threads 1]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.common.clock import BUNDLED, alternate
from benchmarks.common.record import write
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import get_preset
from looptx_core.generation.engine import Engine
from looptx_core.model.loop import LoopedTransformer

STREAMS, TYPES, LOOPS = (1, 2, 4, 8, 16, 32), ("float32", "bf16", "int8"), 2


def engine_of(precision: str) -> Engine:
    tokenizer = load_model(BUNDLED).tokenizer
    shape = ModelConfig(**get_preset("small")["model"])
    config = replace(shape, vocab_size=tokenizer.get_vocab_size(), max_loops=LOOPS)
    torch.manual_seed(0)
    model = LoopedTransformer(config)
    return Engine(model, tokenizer, precision=precision, batch_size=max(STREAMS), kernel="native")


def writing(engine: Engine, streams: int, new: int) -> Callable[[], int]:
    prompts = [[n + 2, n + 3, n + 4, n + 5] for n in range(streams)]
    options = GenerationOptions(temperature=0, max_new_tokens=new, ignore_eos=True, loops=LOOPS)
    return lambda: sum(len(done.tokens) for done in engine.complete(prompts, options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    engines = {precision: engine_of(precision) for precision in TYPES}
    rows = []
    for streams in STREAMS:
        sides = {name: writing(engine, streams, flags.new) for name, engine in engines.items()}
        for name, rates in alternate(sides, flags.rounds).items():
            rows.append(
                {"streams": streams, "weights": name, "tokens_per_cpu_second": rates["cpu"]}
            )
            print(rows[-1])
    write(
        "batches.weights", __doc__.splitlines()[0], rows,
        settings={"new": flags.new, "rounds": flags.rounds}, threads=flags.threads,
    )  # fmt: skip


if __name__ == "__main__":
    main()
