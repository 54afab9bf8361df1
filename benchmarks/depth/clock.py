"""What drawn depths cost on the clock: the seconds a FLOP of training steps, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.depth.clock

Beside steps at a fixed depth of 4, which are read out once, stand steps at lower fixed depths and
steps whose sequences draw their depth, read out after the last loop or the last two. All are steps
of the looped model of `benchmarks.depth.run`, with the fused kernels and by plain torch. Seconds
are of the process. Tokens are those of `schedules`, with their documents; reading them and held-out
text are left out, as every way has them alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common.record import write
from benchmarks.depth.run import FULL, shape, speeches
from looptx_core.data.datamodule import TokenData
from looptx_core.machine.heap import freed_memory_kept
from looptx_core.model.fused import enable_fused
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss
from looptx_core.training.optimizer import build_optimizer, clip_by_part

DEEPEST = 4
BASE = f"fixed at {DEEPEST}"
WAYS: dict[str, dict[str, Any]] = {
    BASE: {"loops": DEEPEST},
    "fixed at 2": {"loops": 2},
    "fixed at 1": {"loops": 1},
    "drawn, last loop read": {"loop_schedule": "sampled"},
    "drawn, last two read": {"loop_schedule": "sampled", "loss_at": "pair"},
}


def stepper(
    changes: dict[str, Any],
) -> Callable[[int, dict[str, torch.Tensor]], tuple[float, float]]:
    """A step of training for its number and batch: its FLOPs and its loops a token."""
    torch.manual_seed(0)
    config = replace(FULL.train, **changes)
    model = LoopedTransformer(shape(64, 1, DEEPEST)).train()
    schedule, optimizer = LoopSchedule(config, DEEPEST), build_optimizer(model, config)

    def step(number: int, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        found = loop_loss(
            model, batch["tokens"], schedule, number, batch["ids"],
            documents=batch.get("documents"), weights=batch.get("weights"), loss_at=config.loss_at,
        )  # fmt: skip
        (found.loss + found.confidence_loss).backward()
        clip_by_part(model, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        return found.flops, found.mean_loops

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = TokenData(
        speeches(FULL), seq_len=FULL.train.seq_len, micro_batch=FULL.train.batch_size,
        batches=args.rounds + 1,
    )  # fmt: skip
    rows = []
    for kernels in (True, False):
        enable_fused(kernels)
        steps = {name: stepper(changes) for name, changes in WAYS.items()}
        totals = {name: torch.zeros(3, dtype=torch.float64) for name in WAYS}
        with freed_memory_kept():
            for number, batch in enumerate(data.train_dataloader()):
                for name, step in steps.items():
                    began = time.process_time()
                    flops, loops = step(number, batch)
                    took = time.process_time() - began
                    if number:  # the first one warms up
                        totals[name] += torch.tensor([took, flops, loops])
        enable_fused(False)
        base = float(totals[BASE][0] / totals[BASE][1])
        for name, (seconds, flops, loops) in ((n, t.tolist()) for n, t in totals.items()):
            rows.append({
                "name": name, "kernels": "fused" if kernels else "plain torch",
                "mean_loops": round(loops / args.rounds, 2),
                "milliseconds": round(1e3 * seconds / args.rounds, 1),
                "gflops_a_step": round(flops / args.rounds / 1e9, 2),
                "against_fixed": round(seconds / flops / base, 3),
            })  # fmt: skip
            print(rows[-1], flush=True)
    write("depth.clock", __doc__.splitlines()[0], rows, settings=vars(args))


if __name__ == "__main__":
    main()
