"""Training speed: looptx against transformers' Llama of the same width and effective depth.

Both have width 512, 12 effective layers, float32, AdamW; with `--shape nano` the default preset's
width 128 and ten layers. Each side has a process of its own, as memory that is given back and
cleared anew is a part of a step; they take steps in turns. Ours is 2 + 2 x 4 + 2 (`nano`: one layer
ten times), with the loss at the final loop only, and beside it the default recipe (depths by
the loss, two read-outs a sequence), with AdamW and with its own Muon: a step of only 2,048 tokens
shows what Muon costs at its worst. "Plain" is ours without the fused kernels.

On a GPU both sides train in bf16 by autocast, each as it comes and compiled, and ours with flash
attention (as `looptx train` takes it): `--device cuda [--rows 32 --length 1024]`.

Beside the clock's the ratios of processor time are told: they hold on a machine that is busy with
other things, where the clock's do not. `--profile` says where a step's time goes instead, and
`--parts` how fast each part is by the ways that were tried.

    python benchmarks/train_speed.py [--rounds 5] [--compile] [--threads 2]
        [--profile | --parts | --device cuda]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile

from looptx_core import __version__
from looptx_core.config.model import ModelConfig
from looptx_core.config.presets import PRESETS
from looptx_core.config.run import TrainConfig
from looptx_core.data.corpus import bundled_text
from looptx_core.data.datamodule import TokenData
from looptx_core.data.shard_writer import tokenize_corpus
from looptx_core.machine.device import best_device
from looptx_core.machine.heap import freed_memory_kept
from looptx_core.model import fused
from looptx_core.model.attention import Attend, Packed, choose_backend, explicit, sdpa
from looptx_core.model.flops import token_flops
from looptx_core.model.loop import LoopedTransformer
from looptx_core.model.rope import rotary_tables
from looptx_core.training.compiled import compile_moves
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.muon import orthogonal
from looptx_core.training.objective import loop_loss
from looptx_core.training.optimizer import build_optimizer

OURS, THEIRS = "looptx, last loop only", "transformers"
PLAIN, THEIRS_KEPT = "looptx, last loop only, plain", "transformers, freed memory kept"
WARM = 3
"""Rounds, after a first step, that bring a process's memory to where it stays."""
VOCAB, ROWS, LENGTH = 4096, 8, 256
SHAPES = {
    "small": ModelConfig(
        vocab_size=VOCAB,
        d_model=512,
        n_heads=8,
        n_kv_heads=4,
        head_dim=64,
        d_ff=1536,
        prelude_layers=2,
        core_layers=2,
        coda_layers=2,
        max_loops=4,
    ),
    "nano": ModelConfig(vocab_size=VOCAB, **PRESETS["nano"]["model"]),
}


class Where(NamedTuple):
    """A device, rows and their length, and what is trained there."""

    device: torch.device = torch.device("cpu")
    rows: int = ROWS
    length: int = LENGTH
    shape: str = "small"

    @property
    def model(self) -> ModelConfig:
        return SHAPES[self.shape]


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
        compile_moves(model)
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
LINES = {
    "matrix products of the blocks": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention, forward": ("aten::_scaled_dot_product_flash_attention_for_cpu", "_Attend"),
    "attention, backward": (
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward", "_AttendBackward",
    ),
    "norms, RoPE, gates (fused)": (
        "_Norm", "_NormBackward", "_Turn", "_TurnBackward", "_GeluGate", "_GeluGateBackward",
    ),
    "loss over the vocabulary, without its products": (
        "aten::_log_softmax", "aten::_log_softmax_backward_data", "aten::nll_loss_forward",
        "aten::nll_loss_backward", "aten::argmax", "_CrossEntropy", "_CrossEntropyBackward",
    ),
    "optimizer": ("aten::_fused_adamw_",),
}  # fmt: skip
"""Names of torch's profiler, by line of the table; what is in none is 'all else'."""


def profiled(step: Callable[[int], None]) -> dict[str, float]:
    """Share of a step by line. The vocabulary's three products have a line of their own."""
    for number in range(WARM):
        step(number)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        step(WARM)
    line_of = {name: line for line, names in LINES.items() for name in names}
    shares: dict[str, float] = dict.fromkeys(
        (*LINES, "loss over the vocabulary, its products", "all else"), 0.0
    )
    for event in found.key_averages(group_by_input_shape=True):
        line = line_of.get(event.key, "all else")
        if event.key == "aten::mm" and any(VOCAB in shape for shape in event.input_shapes[:2]):
            line = "loss over the vocabulary, its products"
        shares[line] += event.self_cpu_time_total
    total = sum(shares.values())
    return {line: round(share / total, 4) for line, share in shares.items()}


def data_seconds() -> dict[str, float]:
    """To pack the tokens of a text into shards, and to read a batch back; seconds a batch."""
    with tempfile.TemporaryDirectory() as folder:
        source, shards = Path(folder) / "text.txt", Path(folder) / "shards"
        source.write_text(bundled_text().read_text("utf-8")[:300_000], "utf-8")
        start = time.process_time()
        tokenize_corpus([str(source)], shards, vocab_size=VOCAB)
        packing = time.process_time() - start
        data = TokenData(shards, seq_len=LENGTH, micro_batch=ROWS, batches=50)
        tokens = data.shards.manifest.splits["train"].tokens
        start = time.process_time()
        for _ in data.train_dataloader():
            pass
        reading = (time.process_time() - start) / 50
    return {
        "tokenizer and packing": round(packing * ROWS * LENGTH / tokens, 4),
        "data loader": round(reading, 4),
    }


def milliseconds(function: Callable[[], object], rounds: int = 7) -> float:
    """Of processor time, the median."""
    function()
    each = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        each.append(time.process_time() - start)
    return round(1e3 * statistics.median(each), 2)


def parts() -> dict[str, dict[str, float]]:
    """Forward and backward of a block's parts by the ways that were tried, 2,048 tokens."""
    model = LoopedTransformer(SHAPES["small"])
    block, model.head = model.core[0], nn.Identity()
    rotary = rotary_tables(torch.arange(LENGTH)[None, None], 64, 1e4, torch.float32)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, requires_grad=True)

    x, heads, wide = draw(ROWS, LENGTH, 512), draw(ROWS, LENGTH, 8, 64), draw(ROWS, LENGTH, 1536)
    logits, targets = draw(ROWS * LENGTH, VOCAB), torch.randint(0, VOCAB, (ROWS * LENGTH,))
    up, q, kv = draw(ROWS, LENGTH, 1536), draw(ROWS, 8, LENGTH, 64), draw(ROWS, 4, LENGTH, 64)
    steps: dict[str, Callable[[], object]] = {
        "norm": lambda: block.mlp_norm(x).sum().backward(),
        "norm and RoPE of queries": lambda: block.attention.q_norm(heads, rotary).sum().backward(),
        "gate": lambda: (
            fused.gelu_gate(wide, up) if fused.ready(wide) else F.gelu(wide) * up
        ).sum().backward(),
        "loss over 4,096 types": lambda: model.score(logits, targets)[0].sum().backward(),
    }  # fmt: skip
    found: dict[str, dict[str, float]] = {name: {} for name in steps}
    for way in ("plain", "fused"):  # the second stays on
        fused.prepare(way == "fused")
        for name, step in steps.items():
            found[name][way] = milliseconds(step)

    weight = torch.randn(1024, 512)
    rows = weight.split([512, 256, 256])
    plain = x.detach().view(-1, 512)
    found["queries, keys and values, forward product"] = {
        "joined": milliseconds(lambda: plain @ weight.T),
        "apart": milliseconds(lambda: [plain @ part.T for part in rows]),
    }

    documents = Packed.of((torch.arange(LENGTH) // 60).expand(ROWS, -1))

    def attention(attend: Attend, seen: Packed | torch.Tensor | None) -> Callable[[], object]:
        return lambda: attend(q, kv, kv, seen).sum().backward()

    for name, packed in (("attention", None), ("attention within documents of 60", documents)):
        found[name] = {"ours": milliseconds(attention(sdpa, packed))}
        fused.prepare(False)
        mask = packed and packed.mask()  # which a model makes once for all of its blocks
        found[name]["torch's fused"] = milliseconds(attention(sdpa, mask))
        found[name]["products and softmax"] = milliseconds(attention(explicit, mask))
        fused.prepare()
    matrices, coefficients = torch.randn(2, 256, 512), (3.4445, -4.775, 2.0315)

    def muon(dtype: torch.dtype) -> Callable[[], object]:
        return lambda: orthogonal(matrices.to(dtype), coefficients, 5, 1e-7)

    found["Muon's iteration, two of 256 x 512"] = {
        "bf16": milliseconds(muon(torch.bfloat16), rounds=1),
        "float32": milliseconds(muon(torch.float32)),
    }
    return found


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
    cost = token_flops(where.model, where.length / 2).at(where.model.max_loops, 1, 1)
    return 3 * cost * where.rows * where.length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--shape", choices=[*SHAPES], default="small")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--parts", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.shape != "small" and (args.profile or args.parts):
        parser.error("--profile and --parts look at small")
    if args.compile and args.device == "cuda":
        parser.error("--device cuda times both, compiled and not")
    result: dict[str, object] = {"threads": args.threads}
    if args.device == "cpu":
        result["kernels"] = fused.prepare()
    if args.parts:
        with freed_memory_kept():
            name, result["milliseconds"] = "train_parts.json", parts()
    elif args.profile:
        name = "train_profile.json"
        odd = Where(length=LENGTH - 1)  # so that no number of tokens is the vocabulary's size
        shares = {THEIRS: profiled(theirs(where=odd))}
        with freed_memory_kept():
            shares[OURS] = profiled(ours(False, odd, **LAST))
            shares["looptx, default recipe"] = profiled(ours(False, odd))
        result["shares"] = shares
        result["processor_seconds_a_batch"] = data_seconds()
    else:
        name = "train_speed_compiled.json" if args.compile else "train_speed.json"
        if args.device == "cuda":
            name = f"train_speed_cuda_{args.rows}x{args.length}.json"
        if args.shape != "small":
            name = name.replace(".json", f"_{args.shape}.json")
        where = Where(torch.device(args.device), args.rows, args.length, args.shape)
        result |= timed(args.rounds, args.compile, args.threads, where)
    result["versions"] = {
        "looptx": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result, indent=2))
    (Path(__file__).parent / "results" / name).write_text(json.dumps(result, indent=2) + "\n")


def _sit(side: str, compiled: bool, threads: int, where: Where, orders: Connection) -> None:
    """One side in a process of its own: a step for each number that comes, seconds back."""
    torch.set_num_threads(threads)
    on_gpu = where[0].type == "cuda"
    compiled |= side.endswith(COMPILED)
    side = side.removesuffix(COMPILED)
    if side in (THEIRS, THEIRS_KEPT):
        step = theirs(compiled, where)
    else:
        fused.prepare(not on_gpu and not compiled and side != PLAIN)
        step = ours(compiled, where, **SETTINGS[side])
    with nullcontext() if on_gpu or side == THEIRS else freed_memory_kept():
        while (number := orders.recv()) is not None:
            start, used = time.perf_counter(), time.process_time()
            step(number)
            if on_gpu:
                torch.cuda.synchronize()
            orders.send((time.perf_counter() - start, time.process_time() - used))


def timed(rounds: int, compiled: bool, threads: int, where: Where) -> dict[str, object]:
    device, rows, length, shape = where
    sides = [*SETTINGS, THEIRS, THEIRS_KEPT]
    if device.type == "cuda":
        sides = [n + how for n in (*SETTINGS, THEIRS) if n != PLAIN for how in ("", COMPILED)]
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

    common = {
        "tokens_per_second": {
            name: round(rows * length / statistics.median(each), 1) for name, each in clock.items()
        },
        "ratio": ratios(clock, THEIRS),
        "shape": shape,
        "rows": rows,
        "length": length,
        "rounds": rounds,
    }
    if device.type == "cuda":
        beside = ratios(clock, THEIRS + COMPILED)
        name = torch.cuda.get_device_name()
        return common | {"ratio_to_transformers_compiled": beside, "device": name}
    used_by = {name: statistics.median(each) for name, each in processor.items()}
    rate = product_rate(torch.float32, 1536)
    return common | {
        "ratio_of_processor_time": ratios(processor, THEIRS),
        "ratio_to_transformers_with_freed_memory_kept": ratios(clock, THEIRS_KEPT),
        "processor_seconds": {n: round(s, 3) for n, s in used_by.items()},
        "product_gflops_per_processor_second": {
            "float32": round(rate / 1e9, 1),
            "bfloat16": round(product_rate(torch.bfloat16, 384) / 1e9, 1),
        },
        "share_of_the_float32_product_rate": {
            name: round(step_flops(where) / used_by[name] / rate, 3)
            for name in (OURS, PLAIN, THEIRS)
        },
        "compile": compiled,
    }


if __name__ == "__main__":
    main()
