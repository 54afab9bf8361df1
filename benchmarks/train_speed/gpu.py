"""Training on one GPU: tokens/s and MFU with SDPA and flash, compiled and not, and a plain loop.

`small`, and about 1B effective parameters (1024 wide, 2 + 8 x 8 + 2 blocks at eight loops), bf16,
AdamW, packed documents. The plain loop is the same model without documents, depths or a confidence
head: forward, cross-entropy, backward, step. MFU counts 3 forward passes of `token_flops` a token
against the GPU's dense bf16 peak, which --peak gives where it isn't known.

    python -m benchmarks.train_speed.gpu                            # on a GPU, some minutes
    python -m benchmarks.train_speed.gpu --device cpu --shape tiny --steps 2    # that it runs
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common.record import write
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import PRESETS
from looptx_core.config.run import TrainConfig
from looptx_core.errors import MissingError
from looptx_core.model.attention import choose_backend
from looptx_core.model.flops import parameter_count, token_flops
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.compiled import compile_forward
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss
from looptx_core.training.optimizer import build_optimizer

SMALL = ModelConfig(**PRESETS["small"]["model"])
# Shape, loops, rows and length of a step.
SHAPES: dict[str, tuple[ModelConfig, int, int, int]] = {
    "tiny": (replace(SMALL, vocab_size=256, d_model=64, n_heads=2, n_kv_heads=1, head_dim=32,
                     d_ff=128), 2, 2, 64),
    "small": (SMALL, 2, 32, 1024),
    "1b-effective": (
        ModelConfig(vocab_size=32768, d_model=1024, n_heads=16, n_kv_heads=8, head_dim=64,
                    d_ff=4096, prelude_layers=2, core_layers=8, coda_layers=2), 8, 8, 1024),
}  # fmt: skip
# Dense bf16, FLOP/s, by what the name holds; from NVIDIA's data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}


def peak_of(device: torch.device, given: float | None) -> float | None:
    if given or device.type != "cuda":
        return given
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def side(
    shape: ModelConfig, loops: int, rows: int, length: int, device: torch.device,
    attention: str, compiled: bool, plain: bool,
) -> tuple[Callable[[int], None], str]:  # fmt: skip
    """One step of training, and why its back end was taken."""
    torch.manual_seed(0)
    model = LoopedTransformer(shape).to(device)
    backend = choose_backend(attention, device, torch.bfloat16)
    model.attend = backend.attend
    if compiled and plain:  # block by block, as torchtitan does
        for block in (*model.prelude, *model.core, *model.coda):
            block.compile()
    elif compiled:
        compile_forward(model)
    config = TrainConfig(loop_schedule="fixed", loops=loops, loss_at="last", optimizer="adamw",
                         lr=3e-4)  # fmt: skip
    schedule, optimizer = LoopSchedule(config, shape.max_loops), build_optimizer(model, config)
    ids = torch.arange(rows)

    def step(number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, shape.vocab_size, (rows, length + 1), generator=draw)
        documents = (torch.rand(rows, length, generator=draw) < 4 / length).cumsum(1)
        tokens, documents = tokens.to(device), documents.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            if plain:
                logits = model(tokens[:, :-1], loops).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            else:
                found = loop_loss(model, tokens, schedule, number, ids, documents=documents,
                                  loss_at="last")  # fmt: skip
                loss = found.loss + found.confidence_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, backend.reason


def seconds_a_step(step: Callable[[int], None], steps: int, device: torch.device) -> float:
    times = []
    for number in range(steps + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])  # kernels are chosen and compiled in the first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="small,1b-effective")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peak", type=float, help="FLOP/s, dense bf16")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here; --device cpu --shape tiny tries the script")
    peak = peak_of(device, args.peak)
    rows_of_table: list[dict[str, Any]] = []
    for name in args.shape.split(","):
        shape, loops, rows, length = SHAPES[name]
        work = 3 * token_flops(shape, length / 2).at(loops, confidences=0)
        for plain, attention in ((True, "sdpa"), (False, "sdpa"), (False, "flash")):
            for compiled in (False, True):
                if compiled and args.no_compile:
                    continue
                label = {"shape": name, "loop": "plain torch" if plain else "looptx",
                         "attention": attention, "compiled": compiled}  # fmt: skip
                try:
                    step, reason = side(
                        shape, loops, rows, length, device, attention, compiled, plain
                    )
                except MissingError as error:
                    rows_of_table.append(label | {"not here": str(error)})
                    continue
                rate = rows * length / seconds_a_step(step, args.steps, device)
                found = label | {
                    "tokens_per_second": round(rate, 1),
                    "mfu": round(rate * work / peak, 4) if peak else None,
                    "why": reason,
                    "parameters": parameter_count(shape),
# Weights that a token meets, the core's at each loop.
                    "effective_parameters": round(
                        token_flops(shape, 0).at(loops, confidences=0) / 2
                    ),
                }  # fmt: skip
                rows_of_table.append(found)
                print(json.dumps(found), flush=True)
                del step
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    if device.type == "cuda":  # on a CPU the script is only tried
        settings = {"steps": args.steps}
        write("train_speed.gpu", __doc__.splitlines()[0], rows_of_table, settings=settings,
              on_gpu=True)  # fmt: skip


if __name__ == "__main__":
    main()
