"""The exit of a looped pretrained model on held-out answers: what it saves, in loops and seconds.

The rule is calibrated and picked (`inspect_loops`, within 0.5 %) on held-out questions of
`chains.py`, whose targets are the answers: a name and the end token. Then others are read one by
one at each fixed depth and with the exit, tokens given and decoded by themselves: those from the
question's last on, with all before it at full depth, or all after the facts. Losses and loops are
those of the answers, and of their names alone; seconds are those of the whole text. Sides alternate
text by text, and each text counts by its best round. The fixed depth to beat is the smallest one
within 0.5 % of the deepest one's loss.

    OMP_NUM_THREADS=1 python -m benchmarks.retrofit.exits --base smol --adapters FOLDER [FOLDER ...]

The adapters are those of the looped arm that `benchmarks.retrofit.run --keep FOLDER` leaves.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common.record import write
from benchmarks.retrofit.chains import chains
from looptx_core.checkpoint.folder import LoadedModel, load_model
from looptx_core.config.generation import ExitSettings, GenerationOptions
from looptx_core.config.inspection import InspectConfig
from looptx_core.data.own import OwnData, open_data
from looptx_core.finetuning.adapters import load_adapter
from looptx_core.generation.engine import Engine
from looptx_core.inspection.report import inspect_loops

CALIBRATION_SEED, HELD_OUT_SEED = 20_000, 30_000
WITHIN, LENGTH = 0.005, 192


class Text(NamedTuple):
    ids: list[int]
    prompt: int
    """Tokens that are read before decoding."""
    answers: torch.Tensor
    """Which of the tokens after them are answers."""


def picked(loaded: LoadedModel, args: argparse.Namespace) -> ExitSettings:
    """The exit that saves the most within the bound."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "chains.jsonl"
        records = chains(CALIBRATION_SEED, args.calibration, args.people, args.hops)
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        own = OwnData("records", (str(file),), settings={"seq_len": LENGTH, "val_fraction": 0.9})
        config = InspectConfig(
            batch_size=8, val_batches=args.calibration // 16, decode_tokens=0, seq_len=LENGTH,
            max_loops=args.max_loops, target_loss_increase=f"{100 * WITHIN}%",
        )  # fmt: skip
        batches = open_data(
            own, loaded.tokenizer, loaded.config, seq_len=config.seq_len, rows=config.batch_size,
            batches=1, val_batches=config.val_batches, chat=loaded.chat, end=loaded.end,
            held_out_only=True,
        )  # fmt: skip
        document, settings = inspect_loops(loaded, batches, config)
    print(json.dumps(document["choice"]), flush=True)
    return settings


def texts(loaded: LoadedModel, args: argparse.Namespace, from_facts: bool) -> list[Text]:
    found = []
    encode = loaded.tokenizer.encode
    assert loaded.end is not None, "an answer ends"
    for record in chains(HELD_OUT_SEED, args.texts, args.people, args.hops):
        facts = record["prompt"][: record["prompt"].rindex("\n")]
        asked, answer = encode(record["prompt"]).ids, [*encode(record["response"]).ids, loaded.end]
        prompt = len(encode(facts).ids) if from_facts else len(asked) - 1
        counted = [False] * (len(asked) - prompt) + [True] * len(answer)
        found.append(Text(asked + answer, prompt, torch.tensor(counted)))
    return found


def measured(args: argparse.Namespace, adapter: Path) -> list[dict[str, Any]]:
    loaded = load_adapter(load_model(args.base, dtype=torch.float32), adapter)
    engine = Engine(loaded.model, loaded.tokenizer, picked(loaded, args))
    return [
        {"adapter": adapter.name, "decoded": decoded, **row}
        for decoded, from_facts in (("the answer", False), ("question and answer", True))
        for row in decoding(engine, texts(loaded, args, from_facts), args)
    ]


def decoding(engine: Engine, each: list[Text], args: argparse.Namespace) -> list[dict[str, Any]]:
    deepest = args.max_loops
    sides = {
        **{str(n): GenerationOptions(loops=n, prompt_loops=deepest) for n in range(1, deepest + 1)},
        "exit": GenerationOptions(max_loops=deepest, prompt_loops=deepest),
    }
    best = {side: [float("inf")] * len(each) for side in sides}
    loss: dict[str, torch.Tensor] = {}
    loops: dict[str, torch.Tensor] = {}
    for round_ in range(args.rounds):
        answers: dict[str, list[Any]] = {side: [] for side in sides}
        for number, text in enumerate(each):
            for side, options in sides.items():
                began = time.perf_counter()
                found = engine.score_forced(torch.tensor([text.ids]), text.prompt, options)
                best[side][number] = min(best[side][number], time.perf_counter() - began)
                at = text.answers
                answers[side].append((found.loss[0][at], found.loops[0][at].double()))
        if not round_:
            for side, rows in answers.items():
                loss[side] = torch.stack([row[0] for row in rows]).double()
                loops[side] = torch.stack([row[1] for row in rows])
    full = loss[str(deepest)]
    bound = full.mean() * (1 + WITHIN)
    fixed = min(n for n in range(1, deepest + 1) if loss[str(n)].mean() <= bound)
    seconds = {side: sum(rows) for side, rows in best.items()}
    found = []
    for side in sides:
        more = (loss[side] - full).mean(1) / full.mean()
        found.append({
            "side": side, "mean_loops": round(float(loops[side].mean()), 3),
            "loss": round(float(loss[side].mean()), 4), "more": round(float(more.mean()), 5),
            "error": round(float(more.std()) / len(more) ** 0.5, 5),
            "loops_of_names": round(float(loops[side][:, :-1].mean()), 3),
            "seconds": round(seconds[side], 2), "fixed": fixed,
            "times_fewer_loops": round(fixed / float(loops[side].mean()), 3),
            "times_faster": round(seconds[str(fixed)] / seconds[side], 3),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, nargs="+", required=True)
    parser.add_argument("--people", type=int, default=5)
    parser.add_argument("--hops", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--max-loops", type=int, default=2, help="As trained.")
    parser.add_argument("--calibration", type=int, default=2400, help="Questions.")
    parser.add_argument("--texts", type=int, default=128, help="Questions that are decoded.")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    rows = [row for adapter in args.adapters for row in measured(args, adapter)]
    kept_out = ("base", "adapters")
    settings = {key: value for key, value in vars(args).items() if key not in kept_out}
    write("retrofit.exits", __doc__.splitlines()[0], rows, settings=settings)


if __name__ == "__main__":
    main()
