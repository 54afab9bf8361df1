"""What looping brings on plain text: bits per byte by loop, against models that do not loop.

State of the Union speeches, held out by document. One looped block, trained by each of the three
loop schedules, against the same parameters run once and against a plain stack of layers, at equal
tokens and at equal FLOPs (vocabulary products included). Three seeds. Resumable: a run that
stands in the results file is not repeated.

    python benchmarks/depth_on_text.py [--steps 200] [--seeds 0 1 2] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from corpora import DATA, fetch_sotu

from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.shards import open_shards, tokenize_corpus
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss
from looptx_core.training.run import train

RESULTS = Path(__file__).parent / "results" / "depth_on_text.json"
VOCAB = 2048
LAYERS = 3  # of the plain deeper model: the looped models' mean depth in training

LOOPED = ModelConfig(vocab_size=VOCAB, prelude_layers=0, core_layers=1, coda_layers=0)
ONE_LOOP = replace(LOOPED, max_loops=1)
DEEPER = replace(ONE_LOOP, core_layers=LAYERS, injection="none")


def contestants(base: TrainConfig) -> dict[str, tuple[ModelConfig, TrainConfig, bool]]:
    """Name -> model, settings, whether its steps are scaled to the first one's FLOPs.

    The two that choose by the model itself can't be scaled beforehand: they take equal steps.
    """
    once = replace(base, loop_schedule="fixed", loops=1)
    return {
        "looped, loss": (LOOPED, base, False),
        "looped, loss by the loss itself": (LOOPED, replace(base, deeper_by="loss"), False),
        "looped, sampled": (LOOPED, replace(base, loop_schedule="sampled"), True),
        "looped, fixed at 3": (LOOPED, replace(base, loop_schedule="fixed", loops=3), True),
        "one loop, equal tokens": (ONE_LOOP, once, False),
        "one loop, equal FLOPs": (ONE_LOOP, once, True),
        f"{LAYERS} layers, equal tokens": (DEEPER, once, False),
        f"{LAYERS} layers, equal FLOPs": (DEEPER, once, True),
    }


def flops_per_step(model_config: ModelConfig, config: TrainConfig) -> float:
    """Mean over steps whose depths do not hang on the model."""
    model = LoopedTransformer(model_config)
    schedule = LoopSchedule(config, model_config.max_loops)
    tokens = torch.zeros(config.batch_size, config.seq_len + 1, dtype=torch.long)
    with torch.no_grad():
        costs = [
            loop_loss(model, tokens, schedule, step, torch.arange(config.batch_size) + 97 * step,
                      loss_at=config.loss_at).flops
            for step in range(20)
        ]  # fmt: skip
    return statistics.mean(costs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    shards = DATA / f"sotu-{VOCAB}"
    if not shards.exists():
        tokenize_corpus([fetch_sotu()], shards, vocab_size=VOCAB)
    held_out = open_shards(shards).manifest.splits["val"]

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    results |= {
        "command": f"python benchmarks/depth_on_text.py --steps {options.steps}",
        "machine": f"{platform.processor() or platform.machine()}, {options.threads} threads",
        "torch": torch.__version__,
        "held_out_documents": held_out.documents,
    }
    done = {(run["name"], run["seed"]): run for run in results["runs"]}
    for seed in options.seeds:
        base = TrainConfig(
            steps=options.steps, seed=seed, val_batches=12, val_every=10**9, precision="float32"
        )
        for name, (model, config, scaled) in contestants(base).items():
            if (name, seed) in done:
                continue
            if scaled:
                target = done["looped, loss", seed]["flops"]
                steps = round(target / flops_per_step(model, config))
                config = replace(config, steps=steps)
            with tempfile.TemporaryDirectory() as scratch:
                run = train(config, model, data=shards, folder=Path(scratch))
            done[name, seed] = {
                "name": name,
                "seed": seed,
                "steps": run.steps,
                "tokens": run.tokens,
                "flops": run.flops,
                "seconds": round(run.seconds, 1),
                "bits_per_byte_by_loop": [round(x, 4) for x in run.bits_per_byte_by_loop],
            }  # fmt: skip
            results["runs"].append(done[name, seed])
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(seed, name, done[name, seed], flush=True)
    print(table(results["runs"]))


def table(runs: list[dict]) -> str:
    """A Markdown table: means over seeds of bits per byte at loops 1, 2, 3, 5 and 10."""
    lines = [
        "| model | steps | tokens | FLOPs | seconds | 1 | 2 | 3 | 5 | 10 loops | spread |",
        "|" + "---|" * 11,
    ]
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        mean = {key: statistics.mean(run[key] for run in mine)
                for key in ("steps", "tokens", "flops", "seconds")}  # fmt: skip
        curves = [run["bits_per_byte_by_loop"] for run in mine]
        cells = [
            f"{statistics.mean(curve[loop - 1] for curve in curves):.3f}"
            if loop <= len(curves[0]) else ""
            for loop in (1, 2, 3, 5, 10)
        ]  # fmt: skip
        ends = [curve[-1] for curve in curves]
        lines.append(
            f"| {name} | {mean['steps']:.0f} | {mean['tokens'] / 1e6:.2f}M "
            f"| {mean['flops']:.2e} | {mean['seconds']:.0f} | {' | '.join(cells)} "
            f"| {max(ends) - min(ends):.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
