"""What the stored exit brings where 16 streams share each pass, at equal loss.

Held-out texts are decoded by the engine, 16 at once, each token given, so that every side decodes
the same and their losses compare: with the model's own exit, and at each fixed depth. The fixed
depth to beat is the smallest whose loss is within 0.5 % of full depth's. Prompts are read before
the clock starts. Sides alternate, and each group of 16 texts counts by its best round.

    python -m benchmarks.serving.exits --model FOLDER --data SHARDS [--texts 32] [--rounds 5]
        [--length 128] [--threads 2] [--kernel auto] [--variant NAME] [--check]

--check: one round of 16 short texts, and no record.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common.clock import BUNDLED, held_out
from benchmarks.common.record import flat, write
from benchmarks.serving.run import STREAMS
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import GenerationOptions
from looptx_core.generation.engine import Engine

PROMPT, WITHIN = 24, 0.005


class Decoded(NamedTuple):
    """One group of texts, without their prompts and the first token, which the prompt predicts."""

    loss: float
    """Nats, the sum over its tokens."""
    loops: int
    """The sum over its tokens."""
    tokens: int
    seconds: float
    """Of the clock."""
    cpu: float
    """Of the process."""


def decode(engine: Engine, group: list[list[int]], options: GenerationOptions) -> Decoded:
    at = {}

    def prompts_read(_: int) -> None:
        at["cpu"] = time.process_time()

    engine.on_prompt = prompts_read
    found = engine.score_forced(torch.tensor(group), PROMPT, options)
    cpu = time.process_time() - at["cpu"]
    loss, loops = found.loss[:, 1:], found.loops[:, 1:]
    return Decoded(float(loss.double().sum()), int(loops.sum()), loss.numel(), found.seconds, cpu)


def compare(engine: Engine, texts: list[list[int]], rounds: int) -> dict[str, Any]:
    """The figures of the exit, of the fixed depth of equal loss, and of full depth."""
    deepest = engine.model.config.max_loops
    groups = [texts[i : i + STREAMS] for i in range(0, len(texts), STREAMS)]

    def fixed(depth: int) -> GenerationOptions:
        return GenerationOptions(loops=depth, prompt_loops=deepest)

    def loss(options: GenerationOptions) -> float:
        found = [decode(engine, group, options) for group in groups]
        return sum(each.loss for each in found) / sum(each.tokens for each in found)

    losses = [loss(fixed(depth)) for depth in range(1, deepest + 1)]
    equal = next(d for d, own in enumerate(losses, 1) if own <= losses[-1] * (1 + WITHIN))
    sides = {"exit": GenerationOptions(), "fixed": fixed(equal), "full depth": fixed(deepest)}
    best: dict[str, list[list[Decoded]]] = {name: [[] for _ in groups] for name in sides}
    for _ in range(rounds):
        for number, group in enumerate(groups):
            for name, options in sides.items():
                best[name][number].append(decode(engine, group, options))

    def figures(name: str) -> dict[str, float]:
        tokens = sum(found[0].tokens for found in best[name])
        return {
            "tokens_per_second": tokens / sum(min(d.seconds for d in own) for own in best[name]),
            "cpu_ms_a_token": 1000 * sum(min(d.cpu for d in own) for own in best[name]) / tokens,
            "mean_loops": sum(found[0].loops for found in best[name]) / tokens,
            "nats": sum(found[0].loss for found in best[name]) / tokens,
        }

    found = {name: figures(name) for name in sides}
    own = found["exit"]
    return {
        "smallest_equal_depth": equal,
        "loss_by_depth": losses,
        **found,
        "loss_above_full_depth": own["nats"] / losses[-1] - 1,
        **{
            f"exit_against_{name.replace(' ', '_')}": {
                "rate": own["tokens_per_second"] / found[name]["tokens_per_second"],
                "cpu": found[name]["cpu_ms_a_token"] / own["cpu_ms_a_token"],
            }
            for name in ("fixed", "full depth")
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--data", type=Path, help="Shards; by default the bundled text's.")
    parser.add_argument("--texts", type=int, default=2 * STREAMS)
    parser.add_argument("--length", type=int, default=128, help="Tokens of a text.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernel", default="auto", help="auto, native or torch.")
    parser.add_argument("--variant", default="", help="What the record is called beside others.")
    parser.add_argument("--check", action="store_true", help="one short round, and no record")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    texts, rounds, length = flags.texts, flags.rounds, flags.length
    if flags.check:
        texts, rounds, length = STREAMS, 1, 2 * PROMPT
    loaded = load_model(flags.model)
    engine = Engine(
        loaded.model, loaded.tokenizer, loaded.exit, batch_size=STREAMS, kernel=flags.kernel
    )
    prose = held_out(loaded.config.vocab_size, texts, length, data=flags.data)
    row = {"rule": loaded.exit.rule, **flat(compare(engine, prose, rounds))}
    print(json.dumps(row))
    if not flags.check:
        settings = {"streams": STREAMS, "texts": texts, "length": length, "rounds": rounds,
                    "kernel": engine.kernel}  # fmt: skip
        write(
            "serving.exits", __doc__.splitlines()[0], [row],
            variant=flags.variant, settings=settings,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
