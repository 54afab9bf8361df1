"""Full finetuning, LoRA and QLoRA on a reasoning-gym task: what is learned, stored and forgotten.

    pip install reasoning-gym
    OMP_NUM_THREADS=1 python -m benchmarks.finetuning.run --tune
    OMP_NUM_THREADS=1 python -m benchmarks.finetuning.run [--seeds 0] [--methods full-180]

1. The base, 0.6M parameters: one block, two in the loop, up to two loops. It is pretrained on the
   bundled novel, and on lines that hold words of the novel and their mirror images.
2. The task is `spell_backward` with words of 3 to 6 letters: other words, another form, which the
   base does not follow. Answers are exact, greedy, at full depth; questions that were trained on
   are never asked.
3. `--tune` picks each method's learning rate on a seed of its own, by held-out loss, on longer
   words and in fewer steps; QLoRA takes LoRA's.
4. Beside what is solved: the base's own validation loss before and after.

Each run leaves a file under `benchmarks/.data/finetune_task/` and is not done again; the base's
pretraining resumes. The record gathers all of them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import reasoning_gym

from benchmarks.common.corpora import DATA
from benchmarks.common.record import flat, rows_by, write
from looptx_core.checkpoint.folder import LoadedModel, load_model
from looptx_core.config.finetune import FinetuneConfig
from looptx_core.config.generation import GenerationOptions
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.corpus import bundled_text
from looptx_core.data.datamodule import TokenData
from looptx_core.data.resolve import cached_shards
from looptx_core.finetuning.adapters import load_adapter
from looptx_core.finetuning.run import finetune, prepare
from looptx_core.generation.engine import Engine
from looptx_core.training.evaluate import evaluate_all
from looptx_core.training.run import train

WORK = DATA / "finetune_task"
TASK = "spell_backward"
SHAPE = ModelConfig(
    vocab_size=320, d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=384,
    prelude_layers=1, core_layers=2, coda_layers=0, max_loops=2,
)  # fmt: skip
PRETRAINING = TrainConfig(
    steps=400, seq_len=128, batch_size=32, val_every=100, save_every=50, precision="float32"
)
ENOUGH = 200  # of these steps, on two busy cores
ADAPTER: dict[str, Any] = {"lora": True, "lora_rank": 4, "lora_alpha": 8.0}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": ADAPTER,
    "qlora": ADAPTER | {"qlora": True},
}
# By name, kind and steps. Adapters learn more slowly, so they get more steps, and the same too.
METHODS = {
    f"{kind}-{steps}": (kind, steps)
    for kind, steps in (
        ("full", 180), ("lora", 180), ("qlora", 180), ("lora", 420), ("qlora", 420),
    )
}  # fmt: skip
FINETUNING: dict[str, Any] = {
    "seq_len": 148, "batch_size": 12, "val_fraction": 0.02, "precision": "float32",
}  # fmt: skip
RATES = {"full": (1e-3, 3e-3), "lora": (3e-3, 1e-2)}
TUNING_STEPS, TUNING_SEED = 150, 100
LETTERS, TUNING_LETTERS = 6, 10  # of the longest words
SEEDS = [0, 1, 2]
TRAIN, TEST = 20_000, 400
Records = list[dict[str, str]]


class StopAt(L.Callback):
    """Ends the pretraining after so many steps, without changing its learning rates."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


def corpus() -> Path:
    """The novel by chapters, and lines that spell its words, as JSON lines."""
    novel = bundled_text().read_text("utf-8")
    rng = random.Random(0)
    words = sorted(set(re.findall(r"\b[a-z]{3,10}\b", novel)))
    documents = [c.strip() for c in re.split(r"(?m)^(?=CHAPTER \d+\.)", novel) if c.strip()]
    for _ in range(8_000):
        some = rng.choices(words, k=8)
        documents.append("mirror: " + ", ".join(f"{word} {word[::-1]}" for word in some))
    file = WORK / "corpus.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), "utf-8")
    return file


def pretrained() -> Path:
    """The base's folder, trained where it is not there yet."""
    folder = WORK / "base"
    if not (folder / "final" / "config.json").is_file():
        resume = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        train(PRETRAINING, SHAPE, data=_shards(), folder=folder, resume=resume,
              callbacks=[StopAt(ENOUGH)], report=print, watch=print)  # fmt: skip
    return folder / "final"


def _shards() -> Path:
    return cached_shards([corpus()], SHAPE.vocab_size)


def questions(seed: int) -> tuple[Records, Records]:
    """Training and held-out ones. A reasoning-gym item is drawn from (seed + its number)."""
    letters = TUNING_LETTERS if seed == TUNING_SEED else LETTERS

    def some(seed: int, size: int) -> Records:
        rows = reasoning_gym.create_dataset(TASK, size=size, seed=seed, max_word_len=letters)
        return [{"prompt": f"{row['question']}\n", "response": str(row["answer"])} for row in rows]

    held_out = some(10_000_000 + seed * 1_000_000, TEST)
    asked = {record["prompt"] for record in held_out}
    return [r for r in some(seed * 1_000_000, TRAIN) if r["prompt"] not in asked], held_out


def solved(loaded: LoadedModel, questions: Records) -> float:
    """Share of the questions that are answered exactly, greedy and at full depth."""
    engine = Engine(loaded.model, loaded.tokenizer, loaded.exit)
    longest = max(len(loaded.tokenizer.encode(q["response"]).ids) for q in questions)
    options = GenerationOptions(
        max_new_tokens=longest + 2, temperature=0.0, loops=loaded.config.max_loops
    )
    found = engine.complete([q["prompt"] for q in questions], options)
    right = sum(one.text.strip() == q["response"] for one, q in zip(found, questions))
    return right / len(questions)


def own_loss(loaded: LoadedModel) -> float:
    """Of the base's own held-out text and lines, nats a token at full depth."""
    data = TokenData(_shards(), seq_len=128, micro_batch=8, batches=1, val_batches=12)
    loops = loaded.config.max_loops
    return evaluate_all(loaded.model, data.val_dataloader(), loops).loss_by_loop[-1]


def one(kind: str, seed: int, rate: float, steps: int, make: bool = True) -> dict[str, Any] | None:
    """One run's figures, made or read; None for one that is not there and not to be made."""
    file = WORK / f"{kind}-{seed}-{rate:g}-{steps}.json"
    if not file.is_file():
        if not make:
            return None
        found = _run(kind, seed, rate, steps)
        file.write_text(json.dumps(found), "utf-8")
        print(file.stem, json.dumps(found), flush=True)
    return dict(json.loads(file.read_text("utf-8")))


def _run(kind: str, seed: int, rate: float, steps: int) -> dict[str, Any]:
    base = pretrained()
    train_on, test = questions(seed)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        (file := Path(place, "train.jsonl")).write_text(
            "".join(json.dumps(record) + "\n" for record in train_on)
        )
        settings = FINETUNING | KINDS[kind] | {"steps": steps, "val_every": steps}
        config = FinetuneConfig(**settings, lr=rate, seed=seed)
        (folder := Path(place, "run")).mkdir()
        result = finetune(prepare(config, base=base, data=[str(file)]), folder=folder)
        seconds = time.monotonic() - begun
        trained = load_model(base if config.adapts else result.model_folder)
        if config.adapts:
            trained = load_adapter(trained, result.model_folder)
        return {
            "solved": solved(trained, test),
            "trainable_share": round(result.trainable / result.parameters, 4),
            "base_bytes_of_bf16": round(result.base_bytes / (2 * result.parameters), 3),
            "own_loss": round(own_loss(trained), 4),
            "held_out_loss": round(result.loss_by_loop[-1], 4),
            "quantised_loss": result.quantised_loss,
            "ece_before": round(result.ece_before, 4),
            "ece": round(result.ece, 4),
            "seconds": round(seconds, 1),
        }


def rate_of(kind: str) -> float:
    """The learning rate with the lowest held-out loss on the seed for tuning; of those there."""
    kind = "lora" if kind == "qlora" else kind
    losses = {}
    for rate in RATES[kind]:
        file = WORK / f"{kind}-{TUNING_SEED}-{rate:g}-{TUNING_STEPS}.json"
        if file.is_file():
            losses[rate] = json.loads(file.read_text("utf-8"))["held_out_loss"]
    return min(losses, key=lambda rate: losses[rate]) if losses else RATES[kind][1]


def base_figures(seeds: list[int]) -> dict[str, Any]:
    file = WORK / f"base-{'-'.join(map(str, seeds))}.json"
    if not file.is_file():
        base = load_model(pretrained())
        by_seed = [solved(base, questions(seed)[1]) for seed in seeds]
        file.write_text(json.dumps({"solved": by_seed, "own_loss": round(own_loss(base), 4)}))
    return dict(json.loads(file.read_text("utf-8")))


def gathered() -> dict[str, Any]:
    """All that was run so far."""
    seeds: dict[str, dict[str, Any]] = {}
    for seed in SEEDS:
        for method, (kind, steps) in METHODS.items():
            rate = rate_of(kind)
            if found := one(kind, seed, rate, steps, make=False):
                seeds.setdefault(str(seed), {})[method] = {"lr": rate, **found}
    return {
        "task": TASK,
        "letters": [3, LETTERS],
        "training_questions": TRAIN,
        "held_out_questions": TEST,
        "base": base_figures(SEEDS),
        "seeds": seeds,
        "tuning": {
            kind: {str(rate): one(kind, TUNING_SEED, rate, TUNING_STEPS, make=False) or {}
                   for rate in RATES[kind]}
            for kind in RATES
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--tune", action="store_true", help="Only pick the learning rates.")
    parser.add_argument("--base", action="store_true", help="Only make the base.")
    args = parser.parse_args()
    pretrained()
    if args.base:
        return
    if args.tune:
        for kind in RATES:
            for rate in RATES[kind]:
                one(kind, TUNING_SEED, rate, TUNING_STEPS)
        return
    for seed in args.seeds:
        for method in args.methods:
            kind, steps = METHODS[method]
            one(kind, seed, rate_of(kind), steps)
    found = gathered()
    rows = [{"part": "runs", **row} for row in rows_by(found.pop("seeds"), "seed", "method")]
    rows += [{"part": "tuning", **row} for row in rows_by(found.pop("tuning"), "kind", "lr")]
    write("finetuning.run", __doc__.splitlines()[0], rows, settings=flat(found))


if __name__ == "__main__":
    main()
