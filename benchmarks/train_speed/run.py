"""Training speed: looptx against transformers' Llama of the same width and effective depth.

Both have the preset's width and length of text, float32, AdamW: `small` is 2 + 4 x 2 + 2 (12
effective layers), `nano` one layer ten times. Each side has a process of its own, as memory that is
given back and cleared anew is a part of a step; they take steps in turns. Ours has the loss at the
final loop only, and beside it the default recipe (depths by the loss, two read-outs a sequence),
with AdamW and with its own Muon: a step of only 2,048 tokens shows what Muon costs at its worst.
"Plain" is ours without the fused kernels.

On a GPU both sides train in bf16 by autocast, each as it comes and compiled, and ours with flash
attention (as `looptx train` takes it): `--device cuda [--rows 32 --length 1024]`. `--last` leaves
the default recipe out, for cards without room for all.

Beside the clock's the ratios of processor time are told: they hold on a machine that is busy with
other things, where the clock's do not. Where a step's time goes: `train_parts.py`.

    python -m benchmarks.train_speed.run [--rounds 5] [--shape nano] [--rows 8 --length 256]
        [--compile] [--threads 2] [--device cuda [--last]]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers

from benchmarks.common.record import write
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import PRESETS
from looptx_core.config.run import TrainConfig
from looptx_core.machine.device import best_device
from looptx_core.machine.heap import freed_memory_kept
from looptx_core.model import fused
from looptx_core.model.attention import choose_backend
from looptx_core.model.flops import token_flops
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.compiled import compile_forward
from looptx_core.training.kernel_trial import KernelChoice, choose
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss
from looptx_core.training.optimizer import build_optimizer

OURS, THEIRS = "looptx, last loop only", "transformers"
PLAIN, THEIRS_KEPT = "looptx, last loop only, plain", "transformers, freed memory kept"
WARM = 3
"""Rounds, after a first step, that bring a process's memory to where it stays."""
VOCAB = 4096


class Shape(NamedTuple):
    """A model and the rows and their length that it is trained on, 2,048 tokens or 4,096."""

    model: ModelConfig
    rows: int
    length: int


def preset(name: str, rows: int, **model: int) -> Shape:
    shape = ModelConfig(**{"vocab_size": VOCAB} | PRESETS[name]["model"] | model)
    return Shape(shape, rows, TrainConfig(**PRESETS[name]["train"]).seq_len)


SHAPES = {"small": preset("small", 4, max_loops=2), "nano": preset("nano", 32)}


class Where(NamedTuple):
    """A device, rows and their length, and what is trained there."""

    device: torch.device = torch.device("cpu")
    rows: int = SHAPES["small"].rows
    length: int = SHAPES["small"].length
    shape: str = "small"

    @property
    def model(self) -> ModelConfig:
        return SHAPES[self.shape].model


HERE = Where()


def batch(step: int, where: Where) -> torch.Tensor:
    device, rows, length, _ = where
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCAB, (rows, length + 1), generator=generator).to(device)


def half(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def ours(compiled: bool, where: Where = HERE, **settings: object) -> Callable[[int], None]:
    torch.manual_seed(0)
    device, rows, _, _ = where
    model = LoopedTransformer(where.model).to(device)
    if device.type == "cuda":
        model.attend = choose_backend("auto", best_device(), torch.bfloat16).attend
    if compiled:
        compile_forward(model)
    config = TrainConfig(**settings)  # type: ignore[arg-type]
    schedule, optimizer = (
        LoopSchedule(config, where.model.max_loops),
        build_optimizer(model, config),
    )
    ids = torch.arange(rows)

    def step(number: int) -> None:
        with half(device):
            tokens = batch(number, where)
            found = loop_loss(model, tokens, schedule, number, ids, loss_at=config.loss_at)
        (found.loss + found.confidence_loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def theirs(compiled: bool = False, where: Where = HERE) -> Callable[[int], None]:
    torch.manual_seed(0)
    device, _, length, _ = where
    shape = where.model
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ff,
            num_hidden_layers=shape.effective_layers(shape.max_loops),
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            hidden_act="gelu",
            tie_word_embeddings=True,
            use_cache=False,
            max_position_embeddings=max(2048, length),
        )
    ).to(device)
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step(number: int) -> None:
        tokens = batch(number, where)
        with half(device):
            logits = model(tokens[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


COMPILED = ", compiled"
LAST = {"loop_schedule": "fixed", "loss_at": "last", "optimizer": "adamw"}
"""At the model's maximum of loops."""
SETTINGS: dict[str, dict[str, str]] = {
    OURS: LAST,
    PLAIN: LAST,
    "looptx, default recipe, AdamW": {"optimizer": "adamw"},
    "looptx, default recipe": {},
}


def product_rate(dtype: torch.dtype, size: int) -> float:
    """FLOPs a second of processor time in a matrix product, the best of some."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.process_time()
        left @ right.T
        best = min(best, time.process_time() - start)
    return 2 * size**3 / best


def step_flops(where: Where) -> float:
    """Of a step with the loss at the last loop: three times the forward pass."""
    cost = token_flops(where.model, where.length / 2).at(where.model.max_loops)
    return 3 * cost * where.rows * where.length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=[*SHAPES], default="small")
    parser.add_argument("--rows", type=int, help="by default those of the shape")
    parser.add_argument("--length", type=int, help="by default the preset's")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--last", action="store_true", help="the loss at the last loop alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.compile and args.device == "cuda":
        parser.error("--device cuda times both, compiled and not")
    _, rows, length = SHAPES[args.shape]
    rows, length = args.rows or rows, args.length or length
    on_gpu = args.device == "cuda"
    words = {"compiled": args.compile, "last": args.last, "one thread": args.threads == 1}
    variant = [args.shape, f"{rows}x{length}", *(word for word, true in words.items() if true)]
    where = Where(torch.device(args.device), rows, length, args.shape)
    # Tried before the sides start, which find the result in the cache.
    kernels = {} if on_gpu else {"kernels": fused.enable_fused() and str(_choice(where))}
    ours = [side for side in SETTINGS if SETTINGS[side] is LAST or not args.last]
    sides = [*ours, THEIRS, THEIRS_KEPT]
    if args.device == "cuda":
        alike = (side for side in (*ours, THEIRS) if side != PLAIN)
        sides = [side + how for side in alike for how in ("", COMPILED)]
    settings, found = timed(sides, args.rounds, args.compile, args.threads, where)
    table = [{"side": side, **row} for side, row in found.items()]
    write("train_speed.run", __doc__.splitlines()[0], table, variant=" ".join(variant),
          settings=kernels | settings, peers=["transformers"], on_gpu=on_gpu)  # fmt: skip


def _choice(where: Where) -> KernelChoice:
    return choose(where.model, where.rows, where.length)


def _sit(side: str, compiled: bool, threads: int, where: Where, orders: Connection) -> None:
    """One side in a process of its own: a step for each number that comes, seconds back."""
    torch.set_num_threads(threads)
    on_gpu = where[0].type == "cuda"
    compiled |= side.endswith(COMPILED)
    side = side.removesuffix(COMPILED)
    if side in (THEIRS, THEIRS_KEPT):
        step = theirs(compiled, where)
    else:
        fused.enable_fused(not on_gpu and not compiled and side != PLAIN)
        if fused.is_prepared():  # those of them that `looptx train` takes here
            fused.enable_fused(_choice(where).taken)
        step = ours(compiled, where, **SETTINGS[side])
    with nullcontext() if on_gpu or side == THEIRS else freed_memory_kept():
        while (number := orders.recv()) is not None:
            start, used = time.perf_counter(), time.process_time()
            step(number)
            if on_gpu:
                torch.cuda.synchronize()
            orders.send((time.perf_counter() - start, time.process_time() - used))


def timed(
    sides: list[str], rounds: int, compiled: bool, threads: int, where: Where
) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """The settings that were used, and each side's figures."""
    device, rows, length, shape = where
    spawn = multiprocessing.get_context("spawn")
    lines, seats = {}, []
    for side in sides:
        lines[side], other = spawn.Pipe()
        arguments = (side, compiled, threads, where, other)
        seats.append(spawn.Process(target=_sit, args=arguments, daemon=True))
        seats[-1].start()
        other.close()  # so that the end of a process is seen
    clock: dict[str, list[float]] = {name: [] for name in lines}
    processor: dict[str, list[float]] = {name: [] for name in lines}
    for line in lines.values():  # all at once: what is compiled takes a minute each
        line.send(0)
    for line in lines.values():
        line.recv()
    for number in range(1, rounds + 1 + WARM):
        for name, line in lines.items():
            line.send(number)
            seconds, used = line.recv()
            if number > WARM:
                clock[name].append(seconds)
                processor[name].append(used)
    for line in lines.values():
        line.send(None)
    for seat in seats:
        seat.join()

    def ratios(times: dict[str, list[float]], to: str) -> dict[str, float]:
        """Medians over rounds, as such machines change their speed from one minute to the next."""
        return {
            name: round(statistics.median(a / b for a, b in zip(times[to], each)), 3)
            for name, each in times.items()
        }

    columns: dict[str, dict[str, float]] = {
        "tokens_per_second": {
            name: round(rows * length / statistics.median(each), 1) for name, each in clock.items()
        },
        "ratio": ratios(clock, THEIRS),
    }
    settings: dict[str, object] = {
        "shape": shape, "rows": rows, "length": length, "rounds": rounds, "compile": compiled
    }  # fmt: skip
    if device.type == "cuda":
        columns["ratio_to_transformers_compiled"] = ratios(clock, THEIRS + COMPILED)
    else:
        columns["ratio_of_processor_time"] = ratios(processor, THEIRS)
        columns["ratio_to_transformers_with_freed_memory_kept"] = ratios(clock, THEIRS_KEPT)
        columns["processor_seconds"] = {
            name: round(statistics.median(each), 3) for name, each in processor.items()
        }
        for dtype, size in ((torch.float32, 1536), (torch.bfloat16, 384)):
            rate = round(product_rate(dtype, size) / 1e9, 1)
            settings[f"product_gflops_per_processor_second.{str(dtype)[6:]}"] = rate
    return settings, {
        side: {name: values[side] for name, values in columns.items()} for side in sides
    }


if __name__ == "__main__":
    main()
