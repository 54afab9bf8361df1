"""Continuous batching over depth against a static batch at full depth: 16 requests.

bundled: the bundled model by its own calibrated exit; eight hop lines of one to four hops, eight
pieces of held-out prose, all of one length, so that only depth differs.
small: the preset's shape (2 + 4 x 10 + 2), random weights. Depth by token is synthetic: a token
leaves after each loop with a chance of 1/3 (three loops in the mean of ten), its confidence head
run as ever. Lengths differ from 1 to twice the mean there, and 32 requests share 16 rows.

The static side gives every token all loops, and keeps a batch until its last request is done.

    python -m benchmarks.batches.run [--new 48] [--rounds 3] [--threads 1] [--skip-small]
        [--kernel auto]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, models

from benchmarks.common.clock import BUNDLED, alternate, held_out, hop_texts
from benchmarks.common.record import rows_by, write
from looptx_core.backends.base import Pass
from looptx_core.backends.torch_backend import TorchBackend
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import get_preset
from looptx_core.generation.engine import Engine
from looptx_core.generation.running_batch import WorkCounters
from looptx_core.model.loop import LoopedTransformer

ROWS, DEEPEST = 16, 10


class ExitsByChance(TorchBackend):
    """Every token exits with the same chance after each loop, at the usual cost of the check."""

    def begin(self, *arguments: Any, **named: Any) -> Pass:
        run = super().begin(*arguments, **named)
        confidence = run.confidence

        def drawn(state: torch.Tensor, loops: Sequence[int]) -> list[tuple[float, float]]:
            confidence(state, loops)
            exits = [float(stops) for stops in torch.rand(len(loops)) < 1 / 3]
            return [(1000.0 if stops else -1000.0, 1.0) for stops in exits]

        run.confidence = drawn  # type: ignore[method-assign]
        return run


def compare(
    engine: Engine, prompts: list[list[int]], lengths: list[int], exits: GenerationOptions,
    rounds: int,
) -> dict[str, Any]:  # fmt: skip
    work: dict[str, WorkCounters] = {}
    deep = replace(exits, loops=DEEPEST, exit=None)
    # Sixteen at a time to the longest's end: what was not asked for is thrown away.
    batches = [slice(i, i + ROWS) for i in range(0, len(prompts), ROWS)]

    def continuous() -> int:
        work["continuous"] = engine.counters = WorkCounters()
        options = [replace(exits, max_new_tokens=n) for n in lengths]
        return sum(len(f.tokens) for f in engine.complete(prompts, options))

    def static() -> int:
        work["static"] = engine.counters = WorkCounters()
        for part in batches:
            engine.complete(prompts[part], replace(deep, max_new_tokens=max(lengths[part])))
        return sum(lengths)

    runs: dict[str, Callable[[], int]] = {"static": static, "continuous": continuous}
    rates = alternate(runs, rounds)
    tokens = sum(lengths)
    return {
        "kernel": engine.kernel,
        "requests": len(prompts),
        "tokens": tokens,
        **rates,
        "ratio": rates["continuous"]["tokens_per_second"] / rates["static"]["tokens_per_second"],
        "ratio_cpu": rates["continuous"]["cpu"] / rates["static"]["cpu"],
        "core_positions_a_token": {name: done.loops / tokens for name, done in work.items()},
        "readouts_a_token": {name: done.readouts / tokens for name, done in work.items()},
    }


def bundled(new: int, rounds: int, kernel: str) -> dict[str, Any]:
    loaded = load_model(BUNDLED)
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit, batch_size=ROWS, kernel=kernel)
    texts = held_out(loaded.model.config.vocab_size, ROWS // 2, 24)
    lines = [line.split(":")[0] + ":" for line in hop_texts(ROWS // 2)]
    prompts = [*texts, *(loaded.tokenizer.encode(line).ids for line in lines)]
    options = GenerationOptions(temperature=0, ignore_eos=True)
    return compare(engine, prompts, [new] * ROWS, options, rounds)


def small(new: int, rounds: int, kernel: str) -> dict[str, Any]:
    config = ModelConfig(**get_preset("small")["model"])
    torch.manual_seed(0)
    vocabulary = {"<|end|>": 0, **{f"t{i}": i for i in range(1, config.vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    engine = Engine(LoopedTransformer(config), tokenizer, batch_size=ROWS, kernel=kernel)
    engine.backend = ExitsByChance(engine.model)
    draw = random.Random(0)
    prompts = [[draw.randrange(1, config.vocab_size) for _ in range(4)] for _ in range(2 * ROWS)]
    lengths = [draw.randrange(1, 2 * new) for _ in prompts]
    options = GenerationOptions(temperature=0, ignore_eos=True, exit="confidence", threshold=0.5)
    return compare(engine, prompts, lengths, options, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-small", action="store_true")
    parser.add_argument("--kernel", default="auto", help="auto, native or torch.")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    results = {"bundled": bundled(flags.new, flags.rounds, flags.kernel)}
    if not flags.skip_small:
        results["small"] = small(max(2, flags.new // 3), max(1, flags.rounds - 2), flags.kernel)
    write("batches.run", __doc__.splitlines()[0], rows_by(results, "model"))


if __name__ == "__main__":
    main()
