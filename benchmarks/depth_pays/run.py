"""What looping brings on plain text: bits per byte by loop, against models that do not loop.

State of the Union speeches, held out by document. One block, looped, trained by several recipes,
against the same parameters run once and against a plain stack of layers, at equal tokens and at
equal FLOPs (vocabulary products included). Budgets:

    minutes   200 steps of 4,096 tokens, 2,048 token types: depth brings nothing, plain or looped
    pays      500 steps of as many, 512 token types: four layers beat one by four percent, and by
              six with the norm on the embedding that the looped ones have
    12M, 36M  the same models on 12 and 36 million tokens, 3 and 9 times the text; for a GPU
    narrow    width 64, 18 million tokens: what a small block can hold is soon full
    exits     width 64, 9 million tokens, all loops read, the later ones counting more: models for
              exit_on_text.py, by --keep
    exits-wide   width 256, two blocks a loop, 18 million tokens, the same by two priors; for a GPU
    long, long-narrow, long-ten   36 million tokens, width 128, 64, and 64 with up to ten loops:
              drawn depths, by chance or by the loss,
              where each loop can be the last, and all loops at every step; for a GPU

Three seeds. Resumable: a run that stands in the results file is not repeated.

    python -m benchmarks.depth_pays.run [--budget minutes] [--seeds 0 1 2] [--threads 2]
        [--only NAME ...] [--keep FOLDER]

--keep holds on to the models of looped runs, as FOLDER/<name>-<seed>.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.common.arms import flops_per_step, for_flops
from benchmarks.common.corpora import DATA, fetch_sotu
from benchmarks.common.record import results_file, rows_so_far, write
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.shard_writer import tokenize_corpus
from looptx_core.data.shards import open_shards
from looptx_core.training.run import train


@dataclass(frozen=True)
class Budget:
    """How much text a comparison takes, and how deep its models go."""

    name: str
    vocab: int
    layers: int
    """Of the plain deeper model."""
    max_loops: int
    reference: str
    """Whose FLOPs others are scaled to."""
    train: TrainConfig
    width: int = 128
    core: int = 1
    """Blocks of the looped models."""
    confidence: int = 0
    """Units of the confidence head; 0: the default."""
    minimal: bool = False
    """Only what says whether looping pays at equal tokens and at equal FLOPs."""

    @property
    def looped(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocab, prelude_layers=0, core_layers=self.core, coda_layers=0,
            confidence_width=self.confidence, max_loops=self.max_loops,
            retain=0.5,  # the default when most of it was measured
            d_model=self.width, n_heads=self.width // 32, n_kv_heads=max(1, self.width // 64),
            head_dim=32, d_ff=3 * self.width,
        )  # fmt: skip

    def shards(self) -> Path:
        folder = DATA / f"sotu-{self.vocab}"
        if not folder.exists():
            tokenize_corpus([fetch_sotu()], folder, vocab_size=self.vocab)
        return folder


RETAIN = 0.88
RISING = "looped, loop t counts t to the 1.5"
COMMON = TrainConfig(val_every=10**9, save_every=10**9, precision="float32")
BUDGETS = {
    b.name: b
    for b in (
        Budget("minutes", 2048, 3, 10, "looped, loss",
               replace(COMMON, steps=200, val_batches=12)),
        Budget("pays", 512, 4, 4, "the same, retain 0.88",
               replace(COMMON, steps=500, seq_len=256, batch_size=16, val_batches=16)),
        *(
            Budget(f"{tokens}M", 512, 4, 4, "the same, retain 0.88",
                   replace(COMMON, precision="auto", steps=round(tokens * 1e6 / 64 / 256),
                           seq_len=256, batch_size=64, val_batches=16), minimal=True)
            for tokens in (12, 36)
        ),
        Budget("narrow", 512, 4, 4, "the same, retain 0.88",
               replace(COMMON, steps=4400, seq_len=256, batch_size=16, val_batches=16),
               width=64, minimal=True),
        Budget("exits", 512, 4, 4, RISING,
               replace(COMMON, steps=2200, seq_len=256, batch_size=16, val_batches=16), width=64),
        Budget("exits-wide", 512, 4, 4, RISING,
               replace(COMMON, precision="auto", steps=1100, seq_len=256, batch_size=64,
                       val_batches=16), width=256, core=2, confidence=128),
        *(
            Budget(name, 512, 4, 4, "looped, sampled",
                   replace(COMMON, precision="auto", steps=2200, seq_len=256, batch_size=64,
                           val_batches=16), width=width)
            for name, width in (("long", 128), ("long-narrow", 64))
        ),
        Budget("long-ten", 512, 4, 10, "looped, sampled",
               replace(COMMON, precision="auto", steps=2200, seq_len=256, batch_size=64,
                       val_batches=16), width=64),
    )
}  # fmt: skip


def contestants(
    budget: Budget, base: TrainConfig
) -> dict[str, tuple[ModelConfig, TrainConfig, bool]]:
    """Name -> model, settings, whether its steps are scaled to the first one's FLOPs.

    Those that choose by the model itself can't be scaled beforehand: they take equal steps.
    """
    looped, layers = budget.looped, budget.layers
    one_loop = replace(looped, max_loops=1)
    deeper = replace(one_loop, core_layers=layers, injection="none")
    normed = replace(deeper, injection="decay")  # which at one loop is a norm on the embedding
    once = replace(base, loop_schedule="fixed", loops=1)
    fixed = replace(base, loop_schedule="fixed", loops=layers)
    found = {"looped, loss": (looped, base, False)}
    if budget.name.startswith("exits"):
        kept, rising = replace(looped, retain=RETAIN), replace(fixed, loss_at="all")
        powers = (1.5, 1.25) if budget.core > 1 else (1.5,)
        return {
            f"looped, loop t counts t to the {power}": (
                kept, replace(rising, loss_prior=power), False
            )
            for power in powers
        }  # fmt: skip
    if budget.name.startswith("long"):
        schedules = {
            "looped, sampled": replace(base, loop_schedule="sampled"),
            **{
                f"looped, sampled, mean depth of the prior {mean}": replace(
                    base, loop_schedule="sampled", mean_loops=mean
                )
                for mean in (5, 8)
            },
            "looped, sampled, all loops, t counts t to the 1.5": replace(
                base, loop_schedule="sampled", loss_at="all", loss_prior=1.5
            ),
            "looped, loss": base,
            f"looped, fixed at {layers}": fixed,
            f"looped, fixed at {layers}, loss at every loop": replace(fixed, loss_at="all"),
        }
        kept = replace(looped, retain=RETAIN)
        return {name: (kept, config, False) for name, config in schedules.items()}
    if budget.name == "minutes":
        found |= {
            "looped, loss by the loss itself": (looped, replace(base, deeper_by="loss"), False),
            "looped, sampled": (looped, replace(base, loop_schedule="sampled"), True),
            f"looped, fixed at {layers}": (looped, fixed, True),
        }
    else:
        found |= {
            f"looped, fixed at {layers}": (looped, fixed, False),
            f"looped, fixed at {layers}, read at the end": (
                looped, replace(fixed, loss_at="last"), False
            ),
            f"the same, retain {RETAIN}": (
                replace(looped, retain=RETAIN), replace(fixed, loss_at="last"), False
            ),
            f"{layers} layers with a norm on the embedding": (normed, once, False),
        }  # fmt: skip
    found = found | {
        "one loop, equal tokens": (one_loop, once, False),
        "one loop, equal FLOPs": (one_loop, once, True),
        f"{layers} layers, equal tokens": (deeper, once, False),
        f"{layers} layers, equal FLOPs": (deeper, once, True),
    }
    if budget.minimal:
        wanted = (budget.reference, f"{layers} layers with a norm on the embedding",
                  "one loop, equal tokens", "one loop, equal FLOPs")  # fmt: skip
        found = {name: found[name] for name in wanted}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", choices=BUDGETS, default="minutes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="Contestants, by name.")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--results", type=Path, help="The file; by default the budget's own.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    budget = BUDGETS[options.budget]
    on_gpu, shards = torch.cuda.is_available(), budget.shards()
    file = options.results or results_file("depth_pays.run", budget.name, on_gpu)

    for seed in options.seeds:
        base = replace(budget.train, seed=seed)
        for name, (model, config, scaled) in contestants(budget, base).items():
            done = {(run["name"], run["seed"]): run for run in rows_so_far(file)}
            if (name, seed) in done or (options.only and name not in options.only):
                continue
            if scaled:
                target = _flops_of_reference(budget, base, done.get((budget.reference, seed)))
                if target is None:
                    parser.error(f"{name}: first run {budget.reference!r}, whose FLOPs it takes")
                config = for_flops(model, config, target)
            with tempfile.TemporaryDirectory() as scratch:
                run = train(config, model, data=shards, folder=Path(scratch))
                assert run is not None
                if options.keep and model.max_loops > 1:
                    kept = options.keep / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
                    shutil.copytree(run.model_folder, kept, dirs_exist_ok=True)
            found = {
                "name": name,
                "seed": seed,
                "steps": run.steps,
                "tokens": run.tokens,
                "flops": run.flops,
                "seconds": round(run.seconds, 1),
                "bits_per_byte_by_loop": [round(x, 4) for x in run.bits_per_byte_by_loop],
            }
            write(
                "depth_pays.run", __doc__.splitlines()[0], [*rows_so_far(file), found],
                variant=budget.name, on_gpu=on_gpu, file=file,
                settings={"held_out_documents":
                          open_shards(shards).manifest.splits["val"].documents},
            )  # fmt: skip
            print(found, flush=True)
    print(table(rows_so_far(file), budget))


def _flops_of_reference(budget: Budget, base: TrainConfig, run: dict | None) -> float | None:
    """What the reference took, or will where its depths do not hang on the model."""
    model, config, _ = contestants(budget, base)[budget.reference]
    if run is not None:
        return run["flops"]
    return flops_per_step(model, config) * config.steps if config.loop_schedule == "fixed" else None


def table(runs: list[dict], budget: Budget) -> str:
    """A Markdown table: means over seeds of bits per byte at some loops, and at full depth the
    share of what the plain deeper models gain over one loop."""
    shown = [loop for loop in (1, 2, 3, 4, 5, 10) if loop <= budget.max_loops]
    heads = ["model", "steps", "tokens", "FLOPs", "seconds", *map(str, shown), "spread",
             "of the gain"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]

    def ends(name: str) -> list[float]:
        return [run["bits_per_byte_by_loop"][-1] for run in runs if run["name"] == name]

    one = ends("one loop, equal tokens")
    deeper = [f"{budget.layers} layers, equal tokens",
              f"{budget.layers} layers with a norm on the embedding"]  # fmt: skip
    gaps = [statistics.mean(one) - statistics.mean(ends(n)) for n in deeper if one and ends(n)]
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        mean = {key: statistics.mean(run[key] for run in mine)
                for key in ("steps", "tokens", "flops", "seconds")}  # fmt: skip
        curves = [run["bits_per_byte_by_loop"] for run in mine]
        cells = [
            f"{statistics.mean(curve[loop - 1] for curve in curves):.3f}"
            if loop <= len(curves[0]) else ""
            for loop in shown
        ]  # fmt: skip
        shares = ", ".join(
            f"{(statistics.mean(one) - statistics.mean(ends(name))) / gap:.0%}"
            for gap in gaps if gap > 0
        )  # fmt: skip
        lines.append(
            f"| {name} | {mean['steps']:.0f} | {mean['tokens'] / 1e6:.2f}M "
            f"| {mean['flops']:.2e} | {mean['seconds']:.0f} | {' | '.join(cells)} "
            f"| {max(ends(name)) - min(ends(name)):.3f} | {shares} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
