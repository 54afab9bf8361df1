"""p-hop induction (Saunshi et al., arXiv 2502.17416, Table 1), at a laptop's size.

One block looped L times against one block once and L blocks once: the same data, steps and
learning rate. p is drawn for each sequence and stands before it; every position is asked. The
looped model draws its depths and trains its confidence head, so that its exits are measured too:
do the loops used rise with p, and what do they keep of full depth's accuracy?

    python -m benchmarks.p_hop.run [--hops 4] [--loops 6] [--steps 2000] [--seeds 0 1]
    python -m benchmarks.p_hop.run --device cuda --width 128 --heads 8 --length 256 --hops 16 \
        --batch 256 --schedule fixed --lr 5e-3 --layers 1 2 3 --bf16   # the paper's shape, on a GPU

Resumable: a run that stands in the record is not repeated.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.record import flat, results_file, rows_so_far, write
from looptx_core.config.generation import ExitSettings
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.p_hop import IGNORED, p_hop_batch
from looptx_core.inspection.frontier import choose, frontier, rule_depths
from looptx_core.inspection.survey import Survey, merge_surveys, survey_lines
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.calibration import calibrate
from looptx_core.training.compiled import compile_forward
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.metrics import auroc, calibration_error, spearman
from looptx_core.training.objective import loop_loss
from looptx_core.training.optimizer import build_optimizer, clip_by_part, learning_rate_factor

SYMBOLS, TESTED = 4, 1024
SETTING = dict(hops=4, loops=6, length=32, steps=2000, lr=1e-2, width=64, heads=4, batch=64,
               schedule="sampled")  # fmt: skip
"""What a run is known by, with the defaults."""


def setting(**changed: object) -> argparse.Namespace:
    """What a run hangs on, for other benchmarks."""
    where = {"layers": [1], "device": "cpu", "bf16": False, "compile": False}
    return argparse.Namespace(**(SETTING | where | changed))


def shapes(args: argparse.Namespace) -> dict[str, ModelConfig]:
    one = ModelConfig(
        vocab_size=SYMBOLS + args.hops, d_model=args.width, n_heads=args.heads,
        n_kv_heads=args.heads, head_dim=args.width // args.heads, d_ff=4 * args.width,
        prelude_layers=0, core_layers=1, coda_layers=0, max_loops=1, max_seq_len=args.length + 1,
    )  # fmt: skip
    found = {}
    for layers in args.layers:
        core = replace(one, core_layers=layers)
        found[f"{layers} x {args.loops // layers}"] = replace(core, max_loops=args.loops // layers)
        found[f"{layers} x 1"] = core
    return found | {f"{args.loops} x 1": replace(one, core_layers=args.loops)}


def training(args: argparse.Namespace, seed: int) -> TrainConfig:
    return TrainConfig(
        steps=args.steps, batch_size=args.batch, lr=args.lr, seed=seed, weight_decay=0.0,
        loop_schedule=args.schedule, mean_loops=args.loops / 2 + 1, optimizer="muon",
        loss_at="last" if args.schedule == "fixed" else "pair",
    )  # fmt: skip


def train(
    config: ModelConfig, settings: TrainConfig, args: argparse.Namespace
) -> tuple[LoopedTransformer, float, float]:
    """The model, its FLOPs and seconds."""
    torch.manual_seed(settings.seed)
    model = LoopedTransformer(config).to(args.device).train()
    if args.compile:
        compile_forward(model)
    schedule = LoopSchedule(settings, config.max_loops)
    optimizer = build_optimizer(model, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(settings))
    rng = np.random.default_rng((settings.seed, 1))
    flops, began = 0.0, time.monotonic()
    for step in range(settings.steps):
        tokens, targets, _ = p_hop_batch(rng, args.batch, args.length, args.hops, SYMBOLS,
                                         args.device)  # fmt: skip
        asked = (targets != IGNORED).float()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = loop_loss(
                model, tokens, schedule, step, step * args.batch + torch.arange(args.batch),
                targets=targets, weights=asked / asked.mean(), loss_at=settings.loss_at,
            )  # fmt: skip
        optimizer.zero_grad()
        (loss.loss + loss.confidence_loss).backward()
        clip_by_part(model, 1.0)
        optimizer.step()
        scheduler.step()
        flops += loss.flops
        if step % 250 == 0:
            seconds = time.monotonic() - began
            print(f"  step {step} loss {float(loss.deepest):.3f} {seconds:.0f} s", flush=True)
    return model.eval(), flops, time.monotonic() - began


def held_out(
    args: argparse.Namespace, stream: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, targets and which of them are asked, each (sequences, length); p of each."""
    rng = np.random.default_rng((99, stream))
    tokens, targets, hops = p_hop_batch(rng, TESTED, args.length, args.hops, SYMBOLS)
    return tokens, targets, targets != IGNORED, hops


def tested(
    model: LoopedTransformer, args: argparse.Namespace, stream: int
) -> tuple[Survey, torch.Tensor, torch.Tensor]:
    """Held-out sequences, with p and the number of its sequence for each counted token."""
    tokens, targets, asked, hops = held_out(args, stream)
    parts = zip(*(part.split(128) for part in (tokens, asked, targets)))
    depth = model.config.max_loops
    survey = merge_surveys([survey_lines(model, t, depth, c, targets=a) for t, c, a in parts])
    return survey, hops[:, None].expand_as(tokens)[asked], asked.nonzero()[:, 0]


def _by_sequence(values: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """The mean of each sequence's tokens."""
    sums = torch.zeros(TESTED, dtype=torch.double).index_add(0, sequence, values.double())
    counts = sequence.bincount(minlength=TESTED)
    return sums[counts > 0] / counts[counts > 0]


def by_hops(hit: torch.Tensor, hops: torch.Tensor, args: argparse.Namespace) -> list[float]:
    return [round(float(hit[hops == p].float().mean()), 4) for p in range(1, args.hops + 1)]


def exits(model: LoopedTransformer, args: argparse.Namespace) -> dict[str, object]:
    """Calibrated and picked on one stream of sequences, measured on another."""
    fit, *_ = tested(model, args, 1)
    shown, hops, sequence = tested(model, args, 2)
    how = training(args, 0)
    least = LoopSchedule(how, model.config.max_loops).first_read(how.loss_at)
    settings = calibrate(ExitSettings(min_loops=least), fit.evaluation)
    full_loss = float(fit.loss[-1].double().mean())
    context = args.length / 2
    points = frontier(fit, settings, model.config, context)
    full = float(fit.hit[-1].mean())
    # Within half a point of full depth's accuracy on the calibrating stream.
    kept = [p for p in points if p.accuracy >= full - 0.004]
    picked = choose(kept, full_loss, increase=1e9)
    assert picked is not None
    own = picked.settings(settings)
    depth = rule_depths(shown, own)
    confidence = shown.signals(own)["confidence"]
    last = shown.evaluation.token_loss[-1]
    return {
        "rule": picked.rule,
        "threshold": picked.threshold,
        "mean_loops": round(float(depth.double().mean()), 3),
        "mean_loops_by_hops": [
            round(float(depth[hops == p].double().mean()), 3) for p in range(1, args.hops + 1)
        ],
        "spearman_of_loops_and_hops": spearman(depth.float(), hops.float()),
        "the_same_by_sequence": spearman(
            *(_by_sequence(values, sequence) for values in (depth, hops))
        ),
        "accuracy": round(float(shown.hit.gather(0, depth[None] - 1).mean()), 4),
        "accuracy_full": round(float(shown.hit[-1].mean()), 4),
        "ece_full": calibration_error(confidence[-1], shown.hit[-1]),
        "auroc_full": auroc(confidence[-1], shown.hit[-1]),
        "auroc_maxprob_full": auroc(shown.logit_signals["maxprob"][-1], shown.hit[-1]),
        "loss_full": round(float(last.double().mean()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in SETTING.items():
        choices = ("sampled", "fixed") if name == "schedule" else None
        parser.add_argument(f"--{name}", type=type(default), default=default, choices=choices)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--layers", type=int, nargs="+", default=[1], help="Of the looped cores.")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="Some shapes, as '1 x 1'.")
    parser.add_argument("--variant", default="", help="What the record is called beside others.")
    parser.add_argument("--results", type=Path, help="The record's file; by default its own.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_gpu = args.device == "cuda"
    file = args.results or results_file("p_hop.run", args.variant, on_gpu)
    known_by = {name: getattr(args, name) for name in SETTING} | {"bf16": args.bf16}
    for seed in args.seeds:
        for name, config in shapes(args).items():
            done = rows_so_far(file)
            key = {"name": name, "seed": seed, **known_by}
            if (args.only and name not in args.only) or any(
                key.items() <= (SETTING | {"bf16": False} | r).items() for r in done
            ):
                continue
            print(key, flush=True)
            model, flops, seconds = train(config, training(args, seed), args)
            survey, hops, _ = tested(model, args, 2)
            run = {
                **key,
                "parameters": sum(p.numel() for p in model.trunk_parameters()),
                "flops": flops,
                "seconds": round(seconds, 1),
                "accuracy_by_loop": [round(a, 4) for a in survey.evaluation.accuracy_by_loop],
                "accuracy_by_hops_and_loop": [by_hops(hit, hops, args) for hit in survey.hit],
            }
            if config.max_loops > 1:
                run |= flat({"exit": exits(model, args)})
            write("p_hop.run", __doc__.splitlines()[0], [*rows_so_far(file), run],
                  variant=args.variant, on_gpu=on_gpu, file=file)  # fmt: skip
            print({k: v for k, v in run.items() if k != "flops"}, flush=True)


if __name__ == "__main__":
    main()
