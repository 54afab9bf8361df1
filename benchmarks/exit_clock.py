"""What a calibrated exit brings on the clock: real decoding of held-out texts, batch 1.

Against full depth, and against the smallest fixed depth whose loss is within 0.5 % of it. The texts
are held-out prose and hop lines, each token given (`Engine.follow`), so that all sides decode
the same and their losses compare. `share_of_promise`: the time saved against full depth, over what
the saved loops would save at the price of a loop, which is the difference of full depth and one
loop. Then the price of a decision, and of a read-out of the vocabulary, in loops.

    python benchmarks/exit_clock.py [--texts 4] [--rounds 3] [--threads 1] [--model FOLDER]
        [--kernel auto]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clock import BUNDLED, alternate, held_out, hop_texts, write

from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import get_preset
from looptx_core.generation.engine import Engine
from looptx_core.generation.exits import Exit, Readout, calibrated
from looptx_core.generation.native_moves import choose_moves
from looptx_core.model.cache import LoopCache
from looptx_core.model.loop import LoopedTransformer

LENGTH, PROMPT, WITHIN = 128, 24, 0.005


def decoding(
    engine: Engine, texts: list[tuple[list[int], int]], rule: GenerationOptions, rounds: int
) -> dict[str, Any]:
    deepest = engine.model.config.max_loops
    losses: dict[Any, float] = {}
    loops: dict[Any, float] = {}

    def walk(options: GenerationOptions) -> int:
        walked = [engine.follow(torch.tensor([ids]), prompt, options) for ids, prompt in texts]
        loss = torch.cat([w.loss[0, 1:] for w in walked])  # the first comes from the prompt
        losses[options.loops] = float(loss.double().mean())
        loops[options.loops] = float(torch.cat([w.loops[0, 1:] for w in walked]).double().mean())
        return len(loss)

    for depth in range(1, deepest + 1):
        walk(GenerationOptions(loops=depth, prompt_loops=deepest))
    equal = min(d for d in range(1, deepest + 1) if losses[d] <= losses[deepest] * (1 + WITHIN))
    sides: dict[str, GenerationOptions] = {
        "full depth": GenerationOptions(loops=deepest),
        "one loop": GenerationOptions(loops=1, prompt_loops=deepest),
        "fixed": GenerationOptions(loops=equal, prompt_loops=deepest),
        "exit": rule,
    }
    runs: dict[str, Callable[[], int]] = {n: lambda o=o: walk(o) for n, o in sides.items()}
    rates = alternate(runs, rounds)
    table = {
        name: {**rates[name], "mean_loops": loops[o.loops], "nats": losses[o.loops]}
        for name, o in sides.items()
    }
    found: dict[str, Any] = {"smallest_equal_depth": equal, "within": WITHIN, **table}
    for clock in ("tokens_per_second", "cpu"):
        full, one, own = (1 / rates[name][clock] for name in ("full depth", "one loop", "exit"))
        price = (full - one) / (deepest - 1)
        found[f"share_of_promise_{clock}"] = (full - own) / ((deepest - loops["auto"]) * price)
        found[f"exit_against_full_depth_{clock}"] = full / own
        found[f"exit_against_fixed_{clock}"] = 1 / own / rates["fixed"][clock]
    return found


@torch.inference_mode()
def prices(model: LoopedTransformer, kernel: str, repeats: int = 60) -> dict[str, float]:
    """A decision and a read-out as shares of one loop, batch 1, medians of this process's time."""
    settings = ExitSettings()
    moves, cache = choose_moves(model, kernel)[0], LoopCache(model.config, 1, 128, 2)
    rule = Exit(1, model.config.max_loops, settings, "auto")
    tokens = torch.randint(3, 100, (1, 64))
    place = moves.at(cache, [0], 64)
    state = embedding = moves.encode(tokens, place)
    moves.step(state, embedding, [1], place)
    moves.decode(state, place)
    cache.window(64, [0]).advance()
    place = moves.at(cache, [0])
    state = embedding = moves.encode(tokens[:, :1], place)

    def decide() -> None:
        ((logit, gain),) = moves.judge(state, [1])
        rule.stops(1, Readout(*calibrated(logit, gain, 1, settings)))

    parts: dict[str, Callable[[], object]] = {
        "loop": lambda: moves.step(state, embedding, [1], place),
        "decision": decide,
        "readout": lambda: moves.decode(state, place),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            began = time.process_time()
            part()
            times[name].append(time.process_time() - began)
    middle = {name: statistics.median(each) for name, each in times.items()}
    return {
        "loop_ms": middle["loop"] * 1e3,
        "decision_in_loops": middle["decision"] / middle["loop"],
        "readout_in_loops": middle["readout"] / middle["loop"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--texts", type=int, default=4, help="Of each kind.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernel", default="auto", help="auto, native or torch.")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    loaded = load_model(flags.model)
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit, kernel=flags.kernel)
    prose = [(ids, PROMPT) for ids in held_out(loaded.config.vocab_size, flags.texts, LENGTH)]
    encode = loaded.tokenizer.encode
    hops = [
        (encode(line).ids, len(encode(line.split(":")[0]).ids) + 1)
        for line in hop_texts(3 * flags.texts)
    ]
    results: dict[str, Any] = {
        "what": __doc__.splitlines()[0],
        "texts": flags.texts,
        "kernel": engine.kernel,
    }
    for name, texts in (("prose", prose), ("hop lines", hops)):
        # `gain` alone: a token that is sure already may still be mended, at little cost.
        results[name] = {
            rule: decoding(engine, texts, GenerationOptions(exit=rule), flags.rounds)
            for rule in (loaded.exit.rule, "gain")
        }
    shapes = {"bundled": loaded.model}
    for preset in ("small", "medium"):
        torch.manual_seed(0)
        shapes[preset] = LoopedTransformer(ModelConfig(**get_preset(preset)["model"])).eval()
        shapes[preset].join()
    results["prices"] = {name: prices(model, flags.kernel) for name, model in shapes.items()}
    write("exit_clock", results)


if __name__ == "__main__":
    main()
