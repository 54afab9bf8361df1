"""What the exit keeps and saves on held-out text, over several trained seeds, and against rules
that need no training.

Each model by `inspect_loops`: rules are calibrated and picked on one half of its held-out sequences
and measured on the other. d* is the smallest fixed depth within 0.5 % of the full depth's loss.
Ours against training-free: the largest gap, over budgets of FLOPs with read-outs counted, by which
the best of KL, entropy, max-probability and state change beats the best of confidence, gain and
auto.

Three seeds: the bundled model, and two of `looptx train --seed 1` and `--seed 2`.

    python -m benchmarks.exits.run --models FOLDER [FOLDER ...] [--val-batches 40]
        [--data SHARDS] [--variant NAME]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.clock import BUNDLED
from benchmarks.common.record import flat, write
from looptx_core.checkpoint.folder import load_model
from looptx_core.config.inspection import InspectConfig
from looptx_core.data.bundled import bundled_shards
from looptx_core.inspection.report import inspect_loops

OURS, FREE = ("auto", "confidence", "gain"), ("kl", "entropy", "maxprob", "change")
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # of 95 %, by the number of seeds


def judged(folder: Path, val_batches: int, data: Path | None) -> dict[str, Any]:
    loaded = load_model(folder)
    data = data or bundled_shards(loaded.config.vocab_size)
    config = InspectConfig(val_batches=val_batches, decode_tokens=0, target_loss_increase="0.5%")
    document, _ = inspect_loops(loaded, data, config)
    choice, loss = document["choice"], document["loss_by_loop"]
    points = document["frontier"]

    def best(rules: tuple[str, ...], flops: float) -> float:
        """Of their least losses at this budget, between two thresholds of a rule by a line: some
        tokens may go by the one, some by the other."""
        found = [float("inf")]
        for rule in rules:
            own = sorted((p["flops"], p["loss"]) for p in points if p["rule"] == rule)
            below, above = [p for p in own if p[0] <= flops], [p for p in own if p[0] > flops]
            found += [loss for _, loss in below]
            if below and above:
                (a, first), (b, second) = below[-1], above[0]
                found.append(first + (second - first) * (flops - a) / (b - a))
        return min(found)

    least = min(p["flops"] for p in points if p["rule"] in OURS)  # below it a rule has no say
    budgets = [p["flops"] for p in points if p["rule"] in FREE and p["flops"] >= least]
    return {
        "loss_by_loop": loss,
        "depth_brings": 1 - min(loss) / loss[0],
        "d*": choice["fixed"]["mean_loops"],
        "rule": choice["rule"],
        "mean_loops": choice["mean_loops"],
        "share_of_d*": choice["mean_loops"] / choice["fixed"]["mean_loops"],
        "loss_increase": choice["loss_increase"],
        "free_ahead_by_at_most": max(best(OURS, b) - best(FREE, b) for b in budgets) / loss[-1],
        **{key: document[key] for key in
           ("ece", "ece_head", "auroc", "auroc_head", "auroc_maxprob")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="+", default=[BUNDLED])
    parser.add_argument("--val-batches", type=int, default=40)
    parser.add_argument("--data", type=Path, help="Shards; by default the bundled text's.")
    parser.add_argument("--variant", default="", help="What the record is called beside others.")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    each = [judged(folder, args.val_batches, args.data) for folder in args.models]
    for found in each:
        print(json.dumps(found), flush=True)
    together: dict[str, Any] = {}
    for key in [key for key, value in each[0].items() if isinstance(value, float)]:
        values = [found[key] for found in each]
        together[key] = {"mean": statistics.mean(values)}
        if len(values) in STUDENT:
            half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
            together[key]["95 % within"] = half
    rows = [{"model": number, **found} for number, found in enumerate(each)]
    what = " ".join(__doc__.split("\n\n")[0].split())
    write("exits.run", what, rows, variant=args.variant, settings=flat(together))


if __name__ == "__main__":
    main()
