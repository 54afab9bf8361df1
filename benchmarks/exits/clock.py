"""What a calibrated exit brings on the clock: real decoding of held-out texts, batch 1.

Against full depth, and against the smallest fixed depth whose loss is within 0.5 % of it. The texts
are held-out prose, hop lines, and both together, each token given (`Engine.follow`), so that all
sides decode the same and their losses compare. `share_of_promise`: the time saved against full
depth, over what the saved loops would save at the price of a loop, which is the difference of full
depth and one loop. Sides alternate text by text, and each text counts by its best round, as such
machines go at half their speed for a part of the time. Then the price of a decision, and of a
read-out of the vocabulary, in loops.

    python -m benchmarks.exits.clock [--texts 4] [--rounds 20] [--threads 1] [--model FOLDER]
        [--kernel auto] [--kv-policy fill] [--equal-depth 3] [--apart] [--name exit_clock]
        [--data SHARDS]

With --data the texts are held-out prose of these shards. --rounds 0: the prices alone. With --apart
the engine asks for each decision by a call of its own, for comparison.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.clock import BUNDLED, held_out, hop_texts
from benchmarks.common.record import flat, rows_by, write
from looptx_core.backends.base import Pass
from looptx_core.backends.cpu.backend import CpuPass
from looptx_core.backends.select import select_backend
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import get_preset
from looptx_core.generation.engine import Engine, ForcedScores
from looptx_core.model.cache import POLICIES, LoopCache
from looptx_core.model.loop import LoopedTransformer
from looptx_core.stopping.rule import Exit, HeadOutput, fixed_exit

LENGTH, PROMPT, WITHIN = 128, 24, 0.005


def decoding(
    engine: Engine,
    texts: list[tuple[list[int], int]],
    rule: GenerationOptions,
    rounds: int,
    policy: str | None,
    equal: int | None,
) -> dict[str, Any]:
    deepest = engine.model.config.max_loops
    losses: dict[Any, float] = {}
    loops: dict[Any, float] = {}

    def walk(text: tuple[list[int], int], options: GenerationOptions) -> ForcedScores:
        ids, prompt = text
        options = replace(options, kv_policy=policy)
        return engine.score_forced(torch.tensor([ids]), prompt, options)

    def judge(options: GenerationOptions) -> None:
        walked = [walk(text, options) for text in texts]
        loss = torch.cat([w.loss[0, 1:] for w in walked])  # the first comes from the prompt
        losses[options.loops] = float(loss.double().mean())
        loops[options.loops] = float(torch.cat([w.loops[0, 1:] for w in walked]).double().mean())

    for depth in range(1, deepest + 1):
        judge(GenerationOptions(loops=depth, prompt_loops=deepest))
    judge(rule)
    equal = equal or min(
        d for d in range(1, deepest + 1) if losses[d] <= losses[deepest] * (1 + WITHIN)
    )
    sides: dict[str, GenerationOptions] = {
        "full depth": GenerationOptions(loops=deepest),
        "one loop": GenerationOptions(loops=1, prompt_loops=deepest),
        "fixed": GenerationOptions(loops=equal, prompt_loops=deepest),
        "exit": rule,
    }
    best = {name: [float("inf")] * len(texts) for name in sides}
    for _ in range(rounds):
        for number, text in enumerate(texts):
            for name, options in sides.items():
                began = time.perf_counter()
                walk(text, options)
                best[name][number] = min(best[name][number], time.perf_counter() - began)
    seconds = {name: sum(each) for name, each in best.items()}
    tokens = sum(len(ids) - prompt for ids, prompt in texts)
    full, own = seconds["full depth"], seconds["exit"]
    price = (full - seconds["one loop"]) / (deepest - 1)
    return {
        "smallest_equal_depth": equal,
        "within": WITHIN,
        **{
            name: {
                "tokens_per_second": tokens / seconds[name],
                "mean_loops": loops[o.loops],
                "nats": losses[o.loops],
            }
            for name, o in sides.items()
        },
        "share_of_promise": (full - own) / ((deepest - loops["auto"]) * price),
        "exit_against_full_depth": full / own,
        "exit_against_fixed": seconds["fixed"] / own,
        "share_of_promise_against_fixed": (
            (seconds["fixed"] - own) / ((equal - loops["auto"]) * price)
            if loops["auto"] < equal
            else None
        ),
    }


@torch.inference_mode()
def prices(model: LoopedTransformer, kernel: str) -> dict[str, Any]:
    """A decision and a read-out as shares of one loop, batch 1, by the best of each.

    A decision apart has calls of its own; within a run, by `auto` and by `gain` alone, it is the
    difference of two long times, of some runs each, which says something where a loop is short.
    """
    deepest = model.config.max_loops
    settings = ExitSettings(confidence=1.0, gain=-1e9)  # to be asked after each loop, and go on
    backend, cache = select_backend(model, kernel)[0], LoopCache(model.config, 1, 128, deepest)
    tokens = torch.randint(3, 100, (1, 64))
    prompt = backend.begin(cache, [0], 64)
    start = prompt.embed(tokens)
    prompt.logits(prompt.iterate(start, start, [1]))
    cache.view(64, [0]).advance()
    run = backend.begin(cache, [0])
    state = embedding = run.embed(tokens[:, :1])

    def loops_by(own: Exit) -> None:
        for _ in range(many):
            at, loop = state, 0
            while loop < deepest:
                at, count, (output,) = run.until_exit(at, embedding, [loop + 1], [own])
                loop += count
                own.stops(loop, own.signals_of(output, loop))

    def decide() -> None:
        ((logit, gain),) = run.confidence(state, [1])
        exits["auto"].stops(1, exits["auto"].signals_of(HeadOutput(logit, gain, 1.0), 1))

    rules = ("auto", "gain")
    exits = {rule: Exit(1, deepest, settings, rule) for rule in rules}
    exits["fixed"] = fixed_exit(deepest, settings)
    many, repeats = (20, 300) if model.config.d_model < 512 else (1, 60)
    parts: dict[str, Callable[[], object]] = {
        **{name: partial(loops_by, own) for name, own in exits.items()},
        "decision": decide,
        "readout": lambda: run.logits(state),
    }
    best = dict.fromkeys(parts, float("inf"))
    for _ in range(repeats):
        for name, part in parts.items():
            part()  # which brings its weights into the cache
            began = time.perf_counter()
            part()
            best[name] = min(best[name], time.perf_counter() - began)
    loop = best["fixed"] / many / deepest
    return {
        "loop_ms": loop * 1e3,
        "decision_apart_in_loops": best["decision"] / loop,
        "decision_within_a_ride_by_rule_in_loops": {
            rule: (best[rule] - best["fixed"]) / many / (deepest - 1) / loop for rule in rules
        },
        "readout_in_loops": best["readout"] / loop,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--texts", type=int, default=4, help="Of each kind.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernel", default="auto", help="auto, native or torch.")
    parser.add_argument("--data", type=Path, help="Shards; by default the bundled text's.")
    parser.add_argument("--kv-policy", choices=POLICIES, help="By default the model's own.")
    parser.add_argument("--equal-depth", type=int, help="Where it is known from more text.")
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--variant", default="", help="What the record is called beside others.")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    loaded = load_model(flags.model)
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit, kernel=flags.kernel)
    if flags.apart:  # as torch does it, a call for each exit check
        CpuPass.until_exit = Pass.until_exit  # type: ignore[method-assign]
    vocabulary = loaded.config.vocab_size
    prose = [(ids, PROMPT) for ids in held_out(vocabulary, flags.texts, LENGTH, data=flags.data)]
    encode = loaded.tokenizer.encode
    hops = [
        (encode(line).ids, len(encode(line.split(":")[0]).ids) + 1)
        for line in hop_texts(3 * flags.texts)
    ]
    results: dict[str, Any] = {}
    settings = {
        "texts": flags.texts,
        "rounds": flags.rounds,
        "kernel": engine.kernel,
        "kv_policy": flags.kv_policy or loaded.exit.kv_policy,
    }
    kinds = {"prose": prose, "hop lines": hops, "both": prose + hops}
    if flags.data is not None:
        kinds = {"prose": prose}
    for name, texts in kinds.items() if flags.rounds else ():
        # `gain` alone: a token that is sure already may still be mended, at little cost.
        rules = {loaded.exit.rule: GenerationOptions()}
        if flags.data is None:  # else the exit that was stored is the one that was picked
            rules["gain"] = GenerationOptions(exit="gain")
            # About what `--target-loss-increase 0.5%` picks for these models.
            rules["gain at 0.03"] = GenerationOptions(exit="gain", threshold=0.03)
        results[name] = {
            rule: decoding(engine, texts, options, flags.rounds, flags.kv_policy, flags.equal_depth)
            for rule, options in rules.items()
        }
    shapes = {"bundled": loaded.model}
    for preset in ("small", "medium") if flags.model == BUNDLED else ():
        torch.manual_seed(0)
        shapes[preset] = LoopedTransformer(ModelConfig(**get_preset(preset)["model"])).eval()
        shapes[preset].fuse_projections()
    rows = [{"part": "decoding", **row} for row in rows_by(results, "text", "rule")]
    for name, model in shapes.items():
        rows.append({"part": "prices", "model": name, **flat(prices(model, flags.kernel))})
    write("exits.clock", __doc__.splitlines()[0], rows, variant=flags.variant, settings=settings)


if __name__ == "__main__":
    main()
