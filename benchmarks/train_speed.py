"""Training speed: looptx against transformers' Llama of the same width and effective depth.

Both have width 512, 12 effective layers, float32, AdamW; rounds alternate in one process. Ours is
2 + 2 x 4 + 2, with the loss at the final loop only, and beside it the default recipe (depths by
the loss, two read-outs a sequence), with AdamW and with its own Muon: a step of only 2,048 tokens
shows what Muon costs at its worst.

    python benchmarks/train_speed.py [--rounds 5] [--compile]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from looptx_core import __version__
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.model import fused
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.loop_schedule import LoopSchedule
from looptx_core.training.objective import loop_loss
from looptx_core.training.optimizer import build_optimizer

DEFAULT = "looptx, default recipe"
VOCAB, ROWS, LENGTH = 4096, 8, 256


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)


def ours(compile_blocks: bool, **settings: object) -> Callable[[int], None]:
    torch.manual_seed(0)
    model = LoopedTransformer(
        ModelConfig(
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
        )
    )
    if compile_blocks:
        for block in (*model.prelude, *model.core, *model.coda):
            block.compile(dynamic=True)
    config = TrainConfig(**settings)  # type: ignore[arg-type]
    schedule, optimizer = LoopSchedule(config, 4), build_optimizer(model, config)
    ids = torch.arange(ROWS)

    def step(number: int) -> None:
        found = loop_loss(model, batch(number), schedule, number, ids, loss_at=config.loss_at)
        (found.loss + found.confidence_loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def theirs() -> Callable[[int], None]:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            hidden_act="gelu",
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step(number: int) -> None:
        tokens = batch(number)
        logits = model(tokens[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    kernels = fused.prepare()
    sides = {
        "looptx, last loop only": ours(
            args.compile, loop_schedule="fixed", loops=4, loss_at="last", optimizer="adamw"
        ),
        "transformers": theirs(),
        "looptx, default recipe, AdamW": ours(args.compile, optimizer="adamw"),
        DEFAULT: ours(args.compile),
    }
    # Muon's products in bf16 slow whatever follows them, so it takes turns with nobody else.
    quiet = [name for name in sides if name != DEFAULT]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for group in (quiet, [DEFAULT]):
        for number in range(args.rounds + 1):
            for name in group:
                start = time.perf_counter()
                sides[name](number)
                if number:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
    rates = {name: ROWS * LENGTH / statistics.median(each) for name, each in seconds.items()}
    result = {
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": {name: round(rate / rates["transformers"], 3) for name, rate in rates.items()},
        "rounds": args.rounds,
        "compile": args.compile,
        "kernels": kernels,
        "threads": torch.get_num_threads(),
        "versions": {
            "looptx": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    print(json.dumps(result, indent=2))
    name = "train_speed_compiled.json" if args.compile else "train_speed.json"
    (Path(__file__).parent / "results" / name).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
