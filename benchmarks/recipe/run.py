"""The recipe, one change at a time: what each default is worth, at equal FLOPs.

On p-hop (a task that needs depth) and on the State of the Union speeches at the budget where depth
pays (`depth_pays`). Every contestant gets the steps that cost as many FLOPs as the defaults',
vocabulary products included. Resumable: a run that stands in the record is not repeated.

    python -m benchmarks.recipe.run --on p-hop [--seeds 0 1] [--threads 2] [--device cuda]
    python -m benchmarks.recipe.run --on text [--seeds 0]            # on a GPU where there is one
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.arms import for_flops
from benchmarks.common.record import machine, results_file, rows_so_far, write
from benchmarks.depth_pays.run import BUDGETS
from benchmarks.p_hop import run as p_hop
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.p_hop import IGNORED, p_hop_batch
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss
from looptx_core.training.run import train

# On text the base is all sequences at full depth, read at the last loop.
BASE = "the defaults with retain 0.5"
BY_LOSS = "schedule: by the loss"
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    BASE: ({}, {}),
    "schedule: sampled": ({}, {"loop_schedule": "sampled"}),
    BY_LOSS: ({}, {"loop_schedule": "loss"}),
    "schedule: fixed at the maximum": ({}, {"loop_schedule": "fixed"}),
    "deeper by the loss itself": ({}, {"deeper_by": "loss"}),
    "mean depth of the prior 2, not 3": ({}, {"mean_loops": 2.0}),
    "mean depth of the prior 5": ({}, {"mean_loops": 5.0}),
    "loss at every loop": ({}, {"loss_at": "all"}),
    "loss at the last loop": ({}, {"loss_at": "last"}),
    "retain 0.88, now the default": ({"retain": 0.88}, {}),
    "injection: addition": ({"injection": "add"}, {}),
    "injection: none": ({"injection": "none"}, {}),
    "injection: four streams": ({"injection": "streams"}, {}),
    "no norm on queries and keys": ({"qk_norm": False}, {}),
    "AdamW at a quarter of the learning rate": ({}, {"optimizer": "adamw"}),
    "half the learning rate": ({}, {}),
}
# On text, where every depth is the last.
AS_THE_BASE = ("schedule: fixed at the maximum", "deeper by the loss itself",
               "mean depth of the prior 2, not 3", "mean depth of the prior 5",
               "loss at the last loop")  # fmt: skip
P_HOP = p_hop.setting(steps=1000)


def settings(name: str, base: TrainConfig) -> TrainConfig:
    share = {"AdamW at a quarter of the learning rate": 0.25, "half the learning rate": 0.5}
    return replace(base, lr=base.lr * share.get(name, 1.0), **VARIANTS[name][1])


def on_p_hop(name: str, seed: int, flops: float | None) -> dict[str, Any]:
    shape = p_hop.shapes(P_HOP)["1 x 6"]
    model = replace(shape, **{"retain": 0.5, **VARIANTS[name][0]})
    base = TrainConfig(steps=P_HOP.steps, batch_size=P_HOP.batch, lr=P_HOP.lr, seed=seed,
                       weight_decay=0.0)  # fmt: skip
    config = settings(name, base)
    if flops:
        config = replace(config, steps=round(flops / p_hop_flops(model, config)))
    trained, spent, seconds = p_hop.train(model, config, P_HOP)
    survey, hops, _ = p_hop.tested(trained, P_HOP, 2)
    return {
        "steps": config.steps,
        "flops": spent,
        "seconds": round(seconds, 1),
        "accuracy_by_hops": p_hop.by_hops(survey.hit[-1], hops, P_HOP),
        "accuracy_by_loop": [round(a, 4) for a in survey.evaluation.accuracy_by_loop],
    }


def p_hop_flops(model_config: ModelConfig, config: TrainConfig) -> float:
    """Of a step, in the mean; depths that hang on the model are an untrained one's."""
    model, schedule = LoopedTransformer(model_config), LoopSchedule(config, model_config.max_loops)
    rng, found = np.random.default_rng(0), []
    for step in range(20):
        tokens, targets, _ = p_hop_batch(rng, config.batch_size, P_HOP.length, P_HOP.hops,
                                         p_hop.SYMBOLS)  # fmt: skip
        asked = (targets != IGNORED).float()
        with torch.no_grad():
            loss = loop_loss(model, tokens, schedule, step, torch.arange(config.batch_size),
                             targets=targets, weights=asked / asked.mean(),
                             loss_at=config.loss_at)  # fmt: skip
        found.append(loss.flops)
    return statistics.mean(found)


def on_text(name: str, seed: int, flops: float | None) -> dict[str, Any]:
    budget = BUDGETS["pays"]
    model = replace(budget.looped, **VARIANTS[name][0])
    # Depth shows there where all sequences go to the end and are read there.
    base = replace(budget.train, seed=seed, loop_schedule="fixed", loss_at="last")
    config = settings(name, base)
    if flops:
        config = for_flops(model, config, flops)
    with tempfile.TemporaryDirectory() as scratch:
        run = train(config, model, data=budget.shards(), folder=Path(scratch))
    return {
        "steps": run.steps,
        "flops": run.flops,
        "seconds": round(run.seconds, 1),
        "bits_per_byte_by_loop": [round(x, 4) for x in run.bits_per_byte_by_loop],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=("p-hop", "text"), required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="For p-hop.")
    parser.add_argument("--results", type=Path, help="The record's file; by default its own.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_gpu = args.device == "cuda" or (args.on == "text" and torch.cuda.is_available())
    file = args.results or results_file("recipe.run", args.on, on_gpu)
    run = {"p-hop": on_p_hop, "text": on_text}[args.on]
    P_HOP.device = args.device
    as_the_base = AS_THE_BASE if args.on == "text" else (BY_LOSS,)
    chosen = args.only or [name for name in VARIANTS if name not in as_the_base]

    for seed in args.seeds:
        for name in chosen:
            done = {(r["on"], r["name"], r["seed"]): r for r in rows_so_far(file)}
            if (args.on, name, seed) in done:
                continue
            first = done.get((args.on, BASE, seed))
            if first is None and name != BASE:
                parser.error(f"{name}: first run {BASE!r} of this seed, whose FLOPs it takes")
            found = {"on": args.on, "name": name, "seed": seed, "machine": machine(on_gpu),
                     **run(name, seed, first and first["flops"])}  # fmt: skip
            write("recipe.run", __doc__.splitlines()[0], [*rows_so_far(file), found],
                  variant=args.on, on_gpu=on_gpu, file=file)  # fmt: skip
            print(found, flush=True)


if __name__ == "__main__":
    main()
