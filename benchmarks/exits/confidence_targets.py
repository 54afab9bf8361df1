"""What the confidence head should learn: targets compared on one trained trunk, which is frozen.

Heads of one shape, from the same start, learn on the states of training sequences, all loops
alike, and are calibrated on one half of the held-out ones and measured on the other. By target:

    right or wrong      cross-entropy against the top token's own probability, the default; against
                        [top token == label], the default before; or exp(-loss)
    the gain            the drop of the loss to the next loop, the default; Ouro's squashed one,
                        sigmoid(50 (max(0, drop) - 0.005)) (arXiv 2510.25741); the drop to the last
                        loop; the largest drop still to come

Measured: AUROC and ECE of the head's confidence at full depth; of the rule `gain` over its
thresholds, at a mean of some loops, how much of full depth's loss (text, per cent) or accuracy
(p-hop, points) is lost.

    python -m benchmarks.exits.confidence_targets [--on text p-hop] [--seeds 0 1] [--threads 2]

Text: the bundled model on *Moby Dick* and lines. p-hop: one layer of six loops, trained here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.clock import BUNDLED
from benchmarks.common.record import results_file, rows_by, rows_so_far, write
from benchmarks.p_hop import run as p_hop
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.generation import ExitSettings
from looptx_core.data.bundled import bundled_shards
from looptx_core.data.datamodule import TokenData
from looptx_core.inspection.frontier import frontier
from looptx_core.inspection.survey import Survey, two_surveys
from looptx_core.model.confidence import Confidence, ConfidenceHead
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.calibration import calibrate
from looptx_core.training.evaluate import evaluate_loops
from looptx_core.training.metrics import auroc, calibration_error

STEPS, PAIRS, LR = 1500, 4096, 3e-3
AT = (1.25, 1.5, 2.0)


@dataclass
class Seen:
    """Counted tokens after each loop: states (loops, tokens, d_model); others (loops, tokens)."""

    state: Tensor
    loss: Tensor
    hit: Tensor
    top: Tensor
    """The probability of the top token."""

    @staticmethod
    def of(
        model: LoopedTransformer, sequences: Sequence[tuple[Tensor, dict[str, Tensor]]], loops: int
    ) -> Seen:
        states: list[list[Tensor]] = [[] for _ in range(loops)]

        def keep(loop: int, rows: slice, state: Tensor, logits: Tensor, judged: Confidence) -> None:
            states[loop - 1].append(state)

        found = [evaluate_loops(model, tokens, loops, observe=keep, **more)
                 for tokens, more in sequences]  # fmt: skip
        return Seen(
            torch.stack([torch.cat(parts) for parts in states]),
            torch.cat([part.token_loss for part in found], 1),
            torch.cat([part.hit for part in found], 1),
            torch.cat([part.top_log_odds for part in found], 1).sigmoid(),
        )


def next_drop(loss: Tensor) -> Tensor:
    return F.pad(loss[:-1] - loss[1:], (0, 0, 0, 1))


def last_drop(loss: Tensor) -> Tensor:
    return loss - loss[-1:]


def best_drop(loss: Tensor) -> Tensor:
    least = loss.flip(0).cummin(0).values.flip(0)
    return F.pad(loss[:-1] - least[1:], (0, 0, 0, 1))


def squared(said: Tensor, drop: Tensor) -> Tensor:
    return F.mse_loss(said, drop.clamp(-4, 4))


def squashed(said: Tensor, drop: Tensor) -> Tensor:
    wanted = torch.sigmoid(50 * (drop.clamp(min=0) - 0.005))
    return F.binary_cross_entropy_with_logits(said, wanted)


def likely(seen: Seen) -> Tensor:
    return seen.top


def right(seen: Seen) -> Tensor:
    return seen.hit


def label(seen: Seen) -> Tensor:
    return torch.exp(-seen.loss)


Target = tuple[
    Callable[[Seen], Tensor], Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]
]
TARGETS: dict[str, Target] = {
    "the defaults": (likely, next_drop, squared),
    "right or wrong, not how likely": (right, next_drop, squared),
    "exp(-loss), not how likely": (label, next_drop, squared),
    "Ouro's squashed drop": (likely, next_drop, squashed),
    "the drop to the last loop": (likely, last_drop, squared),
    "the largest drop to come": (likely, best_drop, squared),
}


def taught(seen: Seen, target: Target, head: ConfidenceHead) -> ConfidenceHead:
    wanted_of, drop_of, error = target
    loops, tokens = seen.loss.shape
    drops = drop_of(seen.loss)
    wanted = wanted_of(seen)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        loop, which = torch.randint(loops, (PAIRS,)), torch.randint(tokens, (PAIRS,))
        said = head(seen.state[loop, which][:, None], loop + 1)
        logit, gain = said.logit[:, 0], said.gain[:, 0]
        judged = F.binary_cross_entropy_with_logits(logit, wanted[loop, which])
        before = loop < loops - 1  # after the last there is nothing to gain
        loss = judged + error(gain[before], drops[loop, which][before])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def measured(
    model: LoopedTransformer, fit: Survey, shown: Survey, context: float, hits: bool
) -> dict[str, Any]:
    settings = calibrate(ExitSettings(), fit.evaluation)
    points = frontier(shown, settings, model.config, context)
    full = float((shown.hit if hits else shown.loss)[-1].double().mean())
    sure = shown.signals(settings)["confidence"][-1]

    def lost(rule: str, loops: float) -> float:
        """Points of accuracy or per cent of the loss, between the rule's points."""
        own = sorted((p.mean_loops, p.accuracy if hits else p.loss) for p in points
                     if p.rule == rule)  # fmt: skip
        low = max((p for p in own if p[0] <= loops), default=own[0])
        high = min((p for p in own if p[0] >= loops), default=own[-1])
        share = (loops - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 0.0
        found = low[1] + share * (high[1] - low[1])
        return 100 * (full - found if hits else found / full - 1)

    return {
        "auroc": auroc(sure, shown.hit[-1]),
        "ece": calibration_error(sure, shown.hit[-1]),
        **{f"gain, {loops} loops": lost("gain", loops) for loops in AT},
        **{f"fixed, {loops} loops": lost("fixed", loops) for loops in AT},
    }


def compare(
    model: LoopedTransformer,
    seen: Seen,
    surveys: Callable[[], tuple[Survey, Survey]],
    seeds: Sequence[int],
    context: float,
    hits: bool,
) -> dict[str, Any]:
    rows: dict[str, Any] = {"as it was trained": [measured(model, *surveys(), context, hits)]}
    own = model.confidence
    for name, target in TARGETS.items():
        rows[name] = []
        for seed in seeds:
            torch.manual_seed(seed)
            model.confidence = taught(seen, target, ConfidenceHead(model.config))
            rows[name].append(measured(model, *surveys(), context, hits))
            print(name, json.dumps({k: round(v, 4) for k, v in rows[name][-1].items()}), flush=True)
    model.confidence = own
    return {
        name: {key: [statistics.mean(r[key] for r in runs),
                     max(r[key] for r in runs) - min(r[key] for r in runs)] for key in runs[0]}
        for name, runs in rows.items()
    }  # fmt: skip


def on_text(seeds: Sequence[int]) -> dict[str, Any]:
    loaded = load_model(BUNDLED, dtype=torch.float32)
    model, loops = loaded.model.eval(), loaded.config.max_loops
    data = TokenData(bundled_shards(loaded.config.vocab_size), seq_len=128, micro_batch=32,
                     batches=24, val_batches=40, seed=7)  # fmt: skip
    data.setup("fit")
    sequences = [(batch["tokens"], {"documents": batch["documents"]})
                 for batch in data.train_dataloader()]  # fmt: skip
    return compare(
        model, Seen.of(model, sequences, loops),
        lambda: two_surveys(model, data.val_dataloader(), loops), seeds, 64, hits=False,
    )  # fmt: skip


def on_p_hop(seeds: Sequence[int]) -> dict[str, Any]:
    args = p_hop.setting()
    shape = p_hop.shapes(args)["1 x 6"]
    model, _, _ = p_hop.train(replace(shape, retain=0.88), p_hop.training(args, 0), args)
    lines = []
    for stream in range(3, 7):
        tokens, targets, asked, _ = p_hop.held_out(args, stream)
        lines.append((tokens, {"targets": targets, "counted": asked}))

    def surveys() -> tuple[Survey, Survey]:
        fit, shown = (p_hop.tested(model, args, stream)[0] for stream in (1, 2))
        return fit, shown

    seen = Seen.of(model, lines, args.loops)
    return compare(model, seen, surveys, seeds, args.length / 2, hits=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--on", nargs="+", choices=("text", "p-hop"), default=["text", "p-hop"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = "exits.confidence_targets"
    found = {task: {"text": on_text, "p-hop": on_p_hop}[task](args.seeds) for task in args.on}
    others = [row for row in rows_so_far(results_file(name)) if row["task"] not in found]
    settings = {"seeds": args.seeds, "values": "mean over seeds, largest less smallest"}
    rows = [*others, *rows_by(found, "task", "target")]
    write(name, __doc__.splitlines()[0], rows, settings=settings)


if __name__ == "__main__":
    main()
