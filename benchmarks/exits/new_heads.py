"""Trained models with a head of the present format, whose text stays as it is.

The units that told both how sure a token is and what a loop would bring tell the former alone, and
stay as they are; beside them a few new ones learn the latter, on the states of training sequences
after every loop. So `exit_on_text.py` and `exit_clock.py` can look at what that is worth
without a training of the trunk.

    python -m benchmarks.exits.new_heads --models FOLDER [FOLDER ...] --out FOLDER [--data SHARDS]
        [--gain-width 16] [--batches 40]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.exits.confidence_targets import TARGETS, Seen, taught
from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.data.bundled import bundled_shards
from looptx_core.data.datamodule import TokenData
from looptx_core.model.confidence import ConfidenceHead
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.calibration import calibrate
from looptx_core.training.evaluate import evaluate_all


@torch.no_grad()
def keep(head: ConfidenceHead, former: ConfidenceHead) -> None:
    """Give a head the log-odds of a former one; its gain stays."""
    narrow = head.widths[0]
    head.norm.load_state_dict(former.norm.state_dict())
    for one, two in ((head.hidden, former.hidden), (head.gate, former.gate)):
        if one is not None and two is not None:
            one.weight[narrow:], one.bias[narrow:] = two.weight, two.bias
    head.loop.weight[:, narrow:] = former.loop.weight
    head.out.weight[:], head.out.bias[:] = former.out.weight[:1], former.out.bias[:1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="Shards; by default the bundled text's.")
    parser.add_argument("--gain-width", type=int, default=0)
    parser.add_argument("--batches", type=int, default=40, help="Of 32 sequences of 256 tokens.")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for number, folder in enumerate(args.models):
        loaded = load_model(folder, dtype=torch.float32)
        if loaded.config.gain_units:
            parser.error(f"{folder}: its gain has units of its own already")
        model, loops = loaded.model, loaded.config.max_loops
        data = TokenData(args.data or bundled_shards(loaded.config.vocab_size), seq_len=256,
                         micro_batch=32, batches=args.batches, val_batches=16, seed=7)  # fmt: skip
        data.setup("fit")
        seen = Seen.of(
            model,
            [(b["tokens"], {"documents": b["documents"]}) for b in data.train_dataloader()],
            loops,
        )
        torch.manual_seed(number)
        model.config = replace(loaded.config, gain_width=args.gain_width)
        former, model.confidence = model.confidence, LoopedTransformer(model.config).confidence
        keep(model.confidence, former)
        model.confidence.norm.requires_grad_(False)  # which both read
        taught(seen, TARGETS["the defaults"], model.confidence)
        keep(model.confidence, former)
        held_out = evaluate_all(model, data.val_dataloader(), loops)
        save_model(
            args.out / folder.name, model, loaded.tokenizer,
            exit_settings=calibrate(loaded.exit, held_out), facts=loaded.facts, overwrite=True,
        )  # fmt: skip
        print(args.out / folder.name, flush=True)


if __name__ == "__main__":
    main()
