"""Adapters on a pretrained model: a training step of ours beside transformers' with PEFT.

    OMP_NUM_THREADS=1 python -m benchmarks.retrofit.training --base smol --gguf SmolLM2.gguf

`smol` is that file converted with `--core auto`. Both sides train LoRA of one rank on every linear
of the core's layers, at one loop, with AdamW, on equal tokens that all count, by autocast in bf16
and in float32; each in a process of its own, whose peak memory is told. They take steps in turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common.record import write
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.conversion.gguf_file import GGUF
from looptx_core.finetuning.adapters import attach
from looptx_core.machine.heap import freed_memory_kept
from looptx_core.model.fused import enable_fused
from looptx_core.training.frozen import cast_frozen
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss
from looptx_core.training.optimizer import build_optimizer

OURS, THEIRS = "looptx", "transformers with PEFT"
LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def ours(args: argparse.Namespace) -> Callable[[torch.Tensor], None]:
    loaded = load_model(args.base, dtype=torch.float32)
    model = loaded.model.train()
    config = FinetuneConfig(
        lora=True, lora_layers="core", lora_rank=args.rank, lora_alpha=2.0 * args.rank,
        loop_schedule="fixed", max_loops=1, mean_loops=1.0, loss_at="last", optimizer="adamw",
    )  # fmt: skip
    attach(model, config)
    if args.precision == "bf16":
        cast_frozen(model, torch.bfloat16)
    schedule, optimizer = LoopSchedule(config, 1), build_optimizer(model, config)

    def step(tokens: torch.Tensor) -> None:
        found = loop_loss(model, tokens, schedule, 0, torch.arange(len(tokens)), loss_at="last")
        (found.loss + found.confidence_loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def theirs(args: argparse.Namespace) -> Callable[[torch.Tensor], None]:
    from peft import LoraConfig, get_peft_model

    config = load_model(args.base).config
    first = config.prelude_layers
    model = get_peft_model(GGUF(args.gguf).in_transformers(), LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=LINEAR,
        layers_to_transform=list(range(first, first + config.core_layers)),
    )).train()  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step(tokens: torch.Tensor) -> None:
        logits = model(tokens[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sit(side: str, precision: str, args: argparse.Namespace, orders: Connection) -> None:
    """One side in a process of its own: a step for each number that comes, seconds back."""
    torch.manual_seed(0)
    enable_fused(side == OURS)  # as `looptx finetune` does
    args.precision = precision
    step = (ours if side == OURS else theirs)(args)
    kept = freed_memory_kept() if side == OURS else nullcontext()
    with kept:
        answer(step, precision, args, orders)


def answer(
    step: Callable[[torch.Tensor], None], precision: str, args: argparse.Namespace,
    orders: Connection,
) -> None:  # fmt: skip
    while (number := orders.recv()) is not None:
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, 40_000, (args.batch, args.seq_len + 1), generator=generator)
        began, used = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            step(tokens)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        orders.send((time.perf_counter() - began, time.process_time() - used, peak))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="A converted model with a core.")
    parser.add_argument("--gguf", type=Path, required=True, help="What it was converted from.")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    rows = []
    for precision in ("bf16", "float32"):
        lines, found = {}, {}
        for side in (OURS, THEIRS):
            lines[side], other = spawn.Pipe()
            spawn.Process(target=sit, args=(side, precision, args, other), daemon=True).start()
            other.close()  # so that the end of a process is seen
            found[side] = []
        for number in range(args.rounds + 1):
            for side, line in lines.items():
                line.send(number)
                times = line.recv()
                if number:  # the first one warms up
                    found[side].append(times)
        for side, line in lines.items():
            wall, used, peaks = zip(*found[side])
            rows.append({
                "side": side, "precision": precision,
                "tokens_per_second": round(args.batch * args.seq_len / statistics.median(wall), 1),
                "tokens_per_cpu_second":
                    round(args.batch * args.seq_len / statistics.median(used), 1),
                "ratio_of_processor_time": round(statistics.median(
                    theirs[1] / own[1] for theirs, own in zip(found[THEIRS], found[side])
                ), 3),
                "peak_gb": round(max(peaks), 2),
            })  # fmt: skip
            print(rows[-1], flush=True)
            line.send(None)
    settings = {k: v for k, v in vars(args).items() if k not in ("base", "gguf")}
    write("retrofit.training", __doc__.splitlines()[0], rows, settings=settings,
          peers=("transformers", "peft"))  # fmt: skip


if __name__ == "__main__":
    main()
