"""What a looped model that llama.cpp runs costs: its two looped containers beside the default.

Both containers have SiLU, no norm on queries and keys, and neither prelude nor coda. Their loops
differ, with n for a norm without weights and s for the state:

    hrm_text   input of loop t: u n(embedding) + a n(s), where s is 0 before the first loop; u is a
               vector and a one number. In the file, u / a goes into the table, and 1 / a into the
               matrices that end a branch.
    nanbeige   input of the first loop: u * embedding, of later ones: v n(s), with vectors u and v,
               which is `injection: norm` and the preset `portable`. Beside it, a first loop that
               reads the embedding itself, or u n(embedding).

The default is one block with `decay` and GELU. Budgets are those of depth_pays at which depth
brings most: `narrow` (18 million tokens, width 64), where four loops beat one at equal FLOPs, and
`pays` (2 million, width 128). All loops are run and the last is read, as there. Two seeds, equal
FLOPs. Resumable: a run that stands in the record is not repeated.

    python -m benchmarks.portable.run [--budget narrow] [--seeds 0 1] [--only NAME ...]
    python -m benchmarks.portable.run --check     # in little: the containers give these logits
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.arms import for_flops, trained
from benchmarks.common.record import results_file, rows_so_far, write
from benchmarks.depth_pays.run import BUDGETS, RETAIN, Budget
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.data.corpus import bundled_text
from looptx_core.data.shard_writer import tokenize_corpus
from looptx_core.model import loop as model_loop
from looptx_core.model.injection import Injection

PARTS = {"activation": "silu", "qk_norm": False}
BASE = "the default"
ARMS: dict[str, tuple[str | None, dict[str, Any]]] = {
    BASE: (None, {}),
    "SiLU, no norm on queries and keys": (None, PARTS),
    "portable": (None, {**PARTS, "injection": "norm"}),
    "nanbeige, first the embedding": ("embedding", PARTS),
    "nanbeige, first its norm": ("normed", PARTS),
    "hrm_text, retain 0.88": ("hrm_text", PARTS),
    "hrm_text, retain 0.5": ("hrm_text", {**PARTS, "retain": 0.5}),
}
"""Name -> what is done between loops, where that is no kind of ours, and the shape's changes."""


class Container(Injection):
    """What a container does between loops, in place of the default's `decay`."""

    container = ""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(replace(config, injection="none"))
        self.eps, kept = config.norm_eps, config.retain
        again = self.container == "hrm_text"
        self.gain = nn.Parameter(torch.full((config.d_model,), 1 - kept if again else 1.0))
        shape = (1,) if again else (config.d_model,)
        self.share = nn.Parameter(torch.full(shape, math.log(kept / (1 - kept)) if again else 1.0))

    def norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def forward(self, state: Tensor, embedding: Tensor, loop: int | Tensor) -> Tensor:
        raw = self.container == "embedding"
        first = embedding if raw else self.gain * self.norm(embedding)
        if loop == 1:
            return first
        if self.container == "hrm_text":
            return first + torch.sigmoid(self.share) * self.norm(state)
        return self.share * self.norm(state)


@contextmanager
def between_loops(container: str | None) -> Iterator[None]:
    """New models have this container's loops."""
    if container is None:
        yield
        return
    before = model_loop.Injection
    model_loop.Injection = type("Container", (Container,), {"container": container})
    try:
        yield
    finally:
        model_loop.Injection = before


def settings(budget: Budget, seed: int) -> TrainConfig:
    return replace(budget.train, seed=seed, loop_schedule="fixed", loops=4, loss_at="last")


def shape_of(name: str, base: ModelConfig) -> ModelConfig:
    return replace(base, **{"retain": RETAIN, **ARMS[name][1]})


@torch.no_grad()
def as_hrm_text(model: model_loop.LoopedTransformer, tokens: Tensor, loops: int) -> Tensor:
    """Logits by hrm_text's equations, with weights folded as a file would hold them."""
    injection, ctx = model.injection, model.context(tokens.shape[1])
    assert isinstance(injection, Container)
    table = injection.norm(model.embedding.weight) * injection.gain
    share = torch.sigmoid(injection.share)
    for block in model.core:
        block.attention.o_proj.weight /= share
        block.mlp.down_proj.weight /= share
    high, low = (table / share)[tokens], torch.zeros(())
    for _ in range(loops):  # the last of them by the high stack, a copy of the low one
        state = high + low
        for block in model.core:
            state = block(state, ctx)
        low = injection.norm(state)
    return low @ (model.head.weight * model.norm.weight).T


def check() -> None:
    """Every arm trains, and hrm_text gives the logits of its container."""
    budget = BUDGETS["narrow"]
    with tempfile.TemporaryDirectory() as scratch:
        text, shards = Path(scratch, "few.txt"), Path(scratch, "shards")
        text.write_text(bundled_text().read_text("utf-8")[:100_000], "utf-8")
        tokenize_corpus([text], shards, vocab_size=budget.vocab)
        few = replace(settings(budget, 0), steps=2, batch_size=2, seq_len=32, val_batches=1)
        for name, (container, _) in ARMS.items():
            with between_loops(container):
                row = trained(shape_of(name, budget.looped), few, shards)
            print(f"{name}: {row['flops']:.3g} FLOPs, {row['bits_per_byte_by_loop'][-1]} bits")
    tokens = torch.randint(budget.vocab, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with between_loops("hrm_text"):
        model = model_loop.LoopedTransformer(shape_of("hrm_text, retain 0.5", budget.looped)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        ours = model(tokens, 4).logits
        other = model(tokens, 3).logits
    theirs = as_hrm_text(model, tokens, 4)
    gap, depth = (float((x - ours).abs().max() / ours.abs().max()) for x in (theirs, other))
    print(f"hrm_text: its container's logits differ by {gap:.1e}, another depth's by {depth:.1e}")
    assert gap < 1e-4 < depth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", choices=("narrow", "pays"), default="narrow")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=ARMS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="The record's file; by default its own.")
    parser.add_argument("--check", action="store_true", help="In little; leaves no record.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.check:
        check()
        return
    budget = BUDGETS[args.budget]
    file, shards = args.results or results_file("portable.run", budget.name, False), budget.shards()
    for seed in args.seeds:
        base = settings(budget, seed)
        for name, (container, _) in ARMS.items():
            done = {(row["name"], row["seed"]): row for row in rows_so_far(file)}
            if (name, seed) in done or (args.only and name not in args.only):
                continue
            shape, config = shape_of(name, budget.looped), base
            with between_loops(container):
                if first := done.get((BASE, seed)):
                    config = for_flops(shape, base, first["flops"])
                row = {"name": name, "seed": seed, **trained(shape, config, shards)}
            write("portable.run", __doc__.splitlines()[0], [*rows_so_far(file), row],
                  variant=budget.name, file=file)  # fmt: skip
            print(row, flush=True)


if __name__ == "__main__":
    main()
