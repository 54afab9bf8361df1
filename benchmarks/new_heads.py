"""New confidence heads for trained models, whose text stays as it is.

A head of the sizes asked for learns on the states of training sequences after every loop; the trunk
is frozen. The model is written anew with it, and calibrated on held-out sequences, so that
`exit_on_text.py` and `exit_clock.py` can look at what a head does without a training of the trunk.

    python benchmarks/new_heads.py --models FOLDER [FOLDER ...] --out FOLDER [--data SHARDS]
        [--confidence-width 128] [--gain-width 16] [--batches 40] [--steps 4000]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from confidence_targets import TARGETS, Seen, taught

from looptx_core.checkpoint.folder import load_model, save_model
from looptx_core.data.bundled import bundled_shards
from looptx_core.data.datamodule import TokenData
from looptx_core.training.calibration import calibrate
from looptx_core.training.evaluate import evaluate_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="Shards; by default the bundled text's.")
    parser.add_argument("--confidence-width", type=int, default=0)
    parser.add_argument("--gain-width", type=int, default=0)
    parser.add_argument("--batches", type=int, default=40, help="Of 32 sequences of 256 tokens.")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for number, folder in enumerate(args.models):
        loaded = load_model(folder, dtype=torch.float32)
        model, loops = loaded.model, loaded.config.max_loops
        data = TokenData(args.data or bundled_shards(loaded.config.vocab_size), seq_len=256,
                         micro_batch=32, batches=args.batches, val_batches=16, seed=7)  # fmt: skip
        data.setup("fit")
        seen = Seen.of(
            model,
            [(b["tokens"], {"documents": b["documents"]}) for b in data.train_dataloader()],
            loops,
        )
        model.config = replace(
            loaded.config, confidence_width=args.confidence_width, confidence_gate=True,
            gain_width=args.gain_width,
        )  # fmt: skip
        model.confidence = taught(model, seen, TARGETS["the defaults"], number, args.steps)
        held_out = evaluate_all(model, data.val_dataloader(), loops)
        save_model(
            args.out / folder.name, model, loaded.tokenizer,
            exit_settings=calibrate(loaded.exit, held_out), facts=loaded.facts, overwrite=True,
        )  # fmt: skip
        print(args.out / folder.name, flush=True)


if __name__ == "__main__":
    main()
