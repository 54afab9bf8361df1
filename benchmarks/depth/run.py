"""When do loops pay: by schedule, by injection, in loops for layers, and where data is limited.

Small models on one core, compared at equal FLOPs, products with the vocabulary included. Parts:

    schedules  speeches: depths that grow, are drawn or fixed, against the same parameters run once
               and a plain stack of as many layers; then those with loops at equal seconds too
    injections the same speeches and FLOPs, fixed at 4 loops: how the state and the input enter a
               loop; `decay` is what `schedules` has
    iso-depth  six blocks deep as r loops of 6 / r blocks, at three widths: what a loop is worth in
               layers, as a power of r (arXiv 2604.21106)
    limited    some chapters of Moby Dick, read 10 and 30 times: the best looped model against the
               best plain one. Eight runs search a shape, then dropout and weight decay, for 10
               epochs; four search the latter again for 30. Other seeds repeat the best ones

Every arm is one call of `Runs.measure`. What stands in a part's record is not run again, so that a
part that was stopped goes on. --check runs every part in little, into a folder of your choice.

    OMP_NUM_THREADS=1 python -m benchmarks.depth.run --part limited schedules iso-depth injections
    python -m benchmarks.depth.run --check --results FOLDER
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arms import flops_per_step, for_flops, trained
from benchmarks.common.corpora import DATA, fetch_sotu
from benchmarks.common.record import Row, machine, results_file, rows_so_far, slug, write
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.corpus import bundled_text
from looptx_core.data.datamodule import TokenData
from looptx_core.data.shard_writer import tokenize_corpus

VOCAB = 512


@dataclass(frozen=True)
class Size:
    """How long the parts take."""

    steps: int
    """Of the looped model of fixed depth on speeches, whose FLOPs its rivals get."""
    depth_steps: int
    """Of every run on iso-depth, which take equal tokens."""
    epochs: tuple[int, int]
    train: TrainConfig
    limited: TrainConfig
    seeds: tuple[int, ...] = (0, 1, 2)
    widths: tuple[int, ...] = (32, 48, 64)
    every: int = 10
    """Every so many chapters of Moby Dick are the text."""


_TRAIN = TrainConfig(
    precision="float32", seq_len=256, batch_size=16, val_batches=16, loop_schedule="fixed",
    loss_at="last",
)  # fmt: skip
_LIMITED = replace(_TRAIN, seq_len=128, batch_size=8)
FULL = Size(110, 60, (10, 30), _TRAIN, _LIMITED)
CHECK = Size(
    2, 1, (1, 2), replace(_TRAIN, seq_len=32, batch_size=2, val_batches=1),
    replace(_LIMITED, seq_len=64, batch_size=64, val_batches=1), (0, 1), (16, 32), 48,
)  # fmt: skip


def shape(width: int, blocks: int, loops: int, **changes: Any) -> ModelConfig:
    """A core alone, run `loops` times. At one loop the injection is a norm on the embedding."""
    config = ModelConfig(
        vocab_size=VOCAB, prelude_layers=0, core_layers=blocks, coda_layers=0, max_loops=loops,
        d_model=width, n_heads=width // 16, n_kv_heads=width // 16, head_dim=16, d_ff=3 * width,
    )  # fmt: skip
    return replace(config, **changes)


class Runs:
    """The rows of one part, kept in its record as they come."""

    def __init__(self, part: str, shards: Path, folder: Path | None) -> None:
        self.part, self.shards = part, shards
        self.file = (
            results_file("depth.run", part)
            if folder is None
            else folder / f"{slug(part)}_{slug(machine())}.json"
        )

    def measure(self, name: str, model: ModelConfig, config: TrainConfig, **more: object) -> Row:
        """Train an arm, unless its row is there. more: further columns, which identify it too."""
        key = {"name": name, "seed": config.seed, **more}
        rows = rows_so_far(self.file)
        for row in rows:
            if key.items() <= row.items():
                return row
        found = key | {
            "width": model.d_model, "blocks": model.core_layers, "loops": model.max_loops,
            "dropout": model.dropout, "weight_decay": config.weight_decay,
            **trained(model, config, self.shards),
        }  # fmt: skip
        write("depth.run", __doc__.splitlines()[0], [*rows, found], variant=self.part,
              file=self.file)  # fmt: skip
        print(json.dumps(found), flush=True)
        return found


def schedules(runs: Runs, size: Size) -> None:
    looped, once, plain = shape(64, 1, 4), shape(64, 1, 1), shape(64, 4, 1)
    for seed in size.seeds:
        base = replace(size.train, seed=seed, steps=size.steps)
        drawn = replace(base, loop_schedule="sampled", loss_at="pair")
        arms = {
            "fixed at 4": (looped, base),
            "sampled": (looped, drawn),
            "grow": (looped, replace(drawn, loop_schedule="grow")),
            "no loops, same parameters": (once, base),
            "no loops, 4 layers": (plain, base),
        }
        flops = size.steps * flops_per_step(looped, base)
        equal = {
            name: runs.measure(name, model, for_flops(model, config, flops), equal="FLOPs")
            for name, (model, config) in arms.items()
        }
        seconds = equal["fixed at 4"]["seconds"]
        for name in list(arms)[1:4]:
            model, config = arms[name]
            steps = max(1, round(equal[name]["steps"] * seconds / max(equal[name]["seconds"], 0.1)))
            runs.measure(name, model, replace(config, steps=steps), equal="seconds")


def injections(runs: Runs, size: Size) -> None:
    looped = shape(64, 1, 4)
    for seed in size.seeds:
        base = replace(size.train, seed=seed, steps=size.steps)
        flops = size.steps * flops_per_step(looped, base)
        for kind in ("streams", "bridge", "add", "none"):
            model = replace(looped, injection=kind)
            runs.measure(kind, model, for_flops(model, base, flops))


def iso_depth(runs: Runs, size: Size) -> None:
    for seed in size.seeds[:2]:
        base = replace(size.train, seed=seed, steps=size.depth_steps)
        for width in size.widths:
            for kind in ("decay", "streams"):
                for loops in (1, 2, 3, 6):
                    if loops > 1 or kind == "decay":  # without a loop nothing is handed on
                        model = shape(width, 6 // loops, loops, injection=kind)
                        runs.measure(kind, model, base, width=width, loops=loops)


LOOPED_SHAPES = ((64, 1, 3), (80, 1, 2), (48, 1, 5), (48, 2, 2))
PLAIN_SHAPES = ((64, 3, 1), (96, 1, 1), (48, 5, 1), (80, 2, 1))
REGULAR = ((0.0, 0.1), (0.1, 0.4), (0.2, 0.1), (0.2, 0.4))
"""Dropout and weight decay, beside the first choice of FIRST."""
FIRST = (0.1, 0.1)


def limited(runs: Runs, size: Size) -> None:
    """All arms at the FLOPs of the first looped shape, read `epochs` times."""
    base = replace(size.limited, seed=size.seeds[0])
    reference = shape(*LOOPED_SHAPES[0])

    def run(name: str, how: tuple[int, int, int], regular: tuple[float, float], epochs: int,
            seed: int) -> Row:  # fmt: skip
        model = shape(*how, dropout=regular[0])
        config = replace(base, weight_decay=regular[1], seed=seed)
        flops = epochs * flops_an_epoch
        return runs.measure(
            name, model, for_flops(model, config, flops), epochs_of_reference=epochs,
            shape=list(how), regular=list(regular),
        )  # fmt: skip

    sequences = len(TokenData(runs.shards, seq_len=base.seq_len, micro_batch=base.batch_size,
                              batches=1).train)  # fmt: skip
    flops_an_epoch = sequences / base.batch_size * flops_per_step(reference, base)
    for name, shapes in (("looped", LOOPED_SHAPES), ("plain", PLAIN_SHAPES)):
        first, later = size.epochs
        tried = {how: reached(run(name, how, FIRST, first, 0)) for how in shapes}
        how = min(tried, key=lambda one: tried[one])
        for epochs in (first, later):
            kinds = (FIRST, *REGULAR) if epochs == first else (FIRST, *REGULAR[1:])
            found = {r: reached(run(name, how, r, epochs, 0)) for r in kinds}
            best = min(found, key=lambda one: found[one])
            for seed in size.seeds:
                run(name, how, best, epochs, seed)


def reached(row: Row) -> float:
    """Bits per byte at full depth."""
    value: float = row["bits_per_byte_by_loop"][-1]
    return value


def speeches(size: Size) -> Path:
    return _shards(f"sotu-{VOCAB}", lambda: [fetch_sotu()], 0.05)


def chapters(size: Size) -> Path:
    """Every n-th chapter of Moby Dick as a document, a fifth of them held out."""

    def source() -> list[Path]:
        text = bundled_text().read_text("utf-8")
        found = re.split(r"(?m)^(?=CHAPTER \d+\.)", text)[1 :: size.every]
        file = DATA / f"moby-dick-{size.every}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"text": one.strip()}) + "\n" for one in found), "utf-8")
        return [file]

    return _shards(f"moby-dick-{size.every}-{VOCAB}", source, 0.2)


def _shards(name: str, source: Callable[[], list[Path]], held_out: float) -> Path:
    if not (DATA / name).exists():
        tokenize_corpus(source(), DATA / name, vocab_size=VOCAB, val_fraction=held_out)
    return DATA / name


PARTS: dict[str, tuple[Callable[[Runs, Size], None], Callable[[Size], Path]]] = {
    "limited": (limited, chapters),
    "schedules": (schedules, speeches),
    "iso-depth": (iso_depth, speeches),
    "injections": (injections, speeches),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--check", action="store_true", help="In little, to see that all works.")
    parser.add_argument("--results", type=Path, help="The folder of the records.")
    args = parser.parse_args()
    if args.check and args.results is None:
        parser.error("--check needs --results, as its figures mean nothing")
    torch.set_num_threads(1)
    size = CHECK if args.check else FULL
    for part in args.part:
        compare, text = PARTS[part]
        compare(Runs(part, text(size), args.results), size)


if __name__ == "__main__":
    main()
