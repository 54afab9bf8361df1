"""Full finetuning, LoRA and QLoRA on one task: what is learned, stored and forgotten.

The base is the bundled model. The task is a `reasoning-gym` one (`--task leg_counting`, where that
package is installed) or, by default, our questions on tables of arrows: exact answers, greedy, at
full depth, on held-out seeds. Beside it the base's own validation loss, before and after.

    OMP_NUM_THREADS=1 python benchmarks/finetune_task.py [--seeds 0 1 2] [--steps 600]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from looptx_core.checkpoint.folder import LoadedModel, load_model
from looptx_core.checkpoint.registry import bundled_model
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.generation import GenerationOptions
from looptx_core.data.bundled import bundled_shards
from looptx_core.data.datamodule import TokenData
from looptx_core.data.hops import hop_questions
from looptx_core.finetuning.adapters import load_adapter
from looptx_core.finetuning.run import finetune, prepare
from looptx_core.generation.engine import Engine
from looptx_core.training.evaluate import evaluate_all

RESULTS = Path(__file__).parent / "results" / "finetune_task.json"
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": True},
    "qlora nf4": {"lora": True, "qlora": True},
}
Records = list[dict[str, str]]


def task(name: str, seed: int, train: int, test: int) -> tuple[Records, Records]:
    """Training and held-out questions; the seeds of the two never meet."""
    if name == "arrows":
        held_out = list(hop_questions(seed, test, stream=3))
        asked = {record["prompt"] for record in held_out}
        learned = hop_questions(seed, train)
        return [record for record in learned if record["prompt"] not in asked], held_out
    import reasoning_gym

    def questions(seed: int, size: int) -> Records:
        rows = reasoning_gym.create_dataset(name, size=size, seed=seed)
        return [{"prompt": f"{row['question']}\n", "response": str(row["answer"])} for row in rows]

    return questions(seed, train), questions(10_000 + seed, test)


def solved(loaded: LoadedModel, questions: Records) -> float:
    """Share of the questions that are answered exactly, greedy and at full depth."""
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit)
    longest = max(len(loaded.tokenizer.encode(q["response"]).ids) for q in questions)
    options = GenerationOptions(
        max_new_tokens=longest + 2, temperature=0.0, loops=loaded.config.max_loops
    )
    found = engine.complete([q["prompt"] for q in questions], options)
    return sum(one.text.strip() == q["response"].strip() for one, q in zip(found, questions)) / len(
        questions
    )


def own_loss(loaded: LoadedModel) -> float:
    """Of the base's own held-out text, nats a token at full depth."""
    data = TokenData(
        bundled_shards(loaded.config.vocab_size), seq_len=128, micro_batch=8, batches=1,
        val_batches=6,
    )  # fmt: skip
    loops = loaded.config.max_loops
    return evaluate_all(loaded.model, data.val_dataloader(), loops).loss_by_loop[-1]


def one_seed(args: argparse.Namespace, seed: int, methods: Sequence[str]) -> dict[str, Any]:
    base = bundled_model()
    train, test = task(args.task, seed, args.train, args.test)
    start = load_model(base)
    found: dict[str, Any] = {"base": {"solved": solved(start, test), "own_loss": own_loss(start)}}
    print(seed, "base", json.dumps(found["base"]), flush=True)
    for method in methods:
        with tempfile.TemporaryDirectory() as place:
            (file := Path(place, "train.jsonl")).write_text(
                "".join(json.dumps(record) + "\n" for record in train)
            )
            config = FinetuneConfig(
                **METHODS[method], lr=args.lr, steps=args.steps, seed=seed,
                val_every=args.steps, val_fraction=0.02, precision="float32",
            )  # fmt: skip
            begun = time.monotonic()
            (folder := Path(place, "run")).mkdir()
            result = finetune(prepare(config, base=base, data=[str(file)]), folder=folder)
            trained = load_model(base if config.adapts else result.model_folder)
            if config.adapts:
                trained = load_adapter(trained, result.model_folder)
            found[method] = {
                "solved": solved(trained, test),
                "trainable_share": round(result.trainable / result.parameters, 4),
                "base_bytes_of_bf16": round(result.base_bytes / (2 * result.parameters), 3),
                "own_loss": round(own_loss(trained), 4),
                "held_out_loss": round(result.loss_by_loop[-1], 4),
                "quantised_loss": result.quantised_loss,
                "ece_before": round(result.ece_before, 4),
                "ece": round(result.ece, 4),
                "seconds": round(time.monotonic() - begun, 1),
            }
        print(seed, method, json.dumps(found[method]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="arrows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--train", type=int, default=16_000)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = {
        "task": args.task,
        "steps": args.steps,
        "lr": args.lr,
        "training_questions": args.train,
        "held_out_questions": args.test,
        "seeds": {str(seed): one_seed(args, seed, args.methods) for seed in args.seeds},
    }
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
