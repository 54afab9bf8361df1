"""Does a memory lower the loss of a long text, beyond what its window sees?

Models of one block, four loops, learn Moby Dick's first four fifths (or four of five State of the
Union speeches) in rows of 1,024 tokens, and read what is left as one stream: with `delta`, with
`infini`, and with a window alone that is a block longer, which takes at least the FLOPs and the
bytes of a memory. Full attention learns as many tokens in rows of 4,096. All read the held-out
text in pieces of 4,096 tokens too, which is as far as full attention sees. The losses, in nats a
token, are means over tokens past the window of the models with a memory.

    python -m benchmarks.memory.stream [--text "moby dick" speeches] [--seeds 0 1] [--check]

Resumable: what stands in the record is not repeated. A model takes some twenty minutes on one core,
full attention twice as many. `--check` trains three steps and leaves no record.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.record import results_file, rows_so_far, slug, write
from benchmarks.memory.learning import (
    KINDS,
    cuttings,
    kept,
    learn,
    options,
    prose,
    set_gates,
    settings_in,
    settings_of,
    vocabulary,
)
from looptx_core.config.model import ModelConfig
from looptx_core.model.flops import parameter_count, state_bytes, token_flops
from looptx_core.model.fused import enable_fused
from looptx_core.model.loop import LoopedTransformer

PIECE = 4096
NAMES = ("delta", "infini", "window alone", "full attention")


def shape(name: str, args: argparse.Namespace) -> ModelConfig:
    """`nano`'s widths, four loops."""
    full = ModelConfig(
        vocab_size=vocabulary(), d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=512,
        prelude_layers=0, core_layers=1, coda_layers=0, loops=args.loops, max_loops=args.loops,
        max_seq_len=PIECE,
    )  # fmt: skip
    if name == "full attention":
        return full
    # Of a head, reading a memory costs what head_dim / 2 tokens of a window cost.
    longer = args.block if name == "window alone" else 0
    return replace(full, memory_window=args.window + longer, memory_block=args.block,
                   **KINDS[name])  # fmt: skip


def draw(
    rng: np.random.Generator, done: float, ids: np.ndarray, rows: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `learning.Draw`: all tokens count."""
    tokens = torch.from_numpy(cuttings(rng, ids, rows, length + 1)).long()
    return tokens[:, :-1], tokens[:, 1:], torch.ones(rows, length)


@torch.inference_mode()
def losses(model: LoopedTransformer, tokens: Tensor) -> Tensor:
    """Of each token but a row's first, (rows, length - 1), in nats. tokens: (rows, length)."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if not model.config.has_memory:  # row by row, as their logits take room
        return torch.stack([
            torch.nn.functional.cross_entropy(model(row[None]).logits[0], wanted, reduction="none")
            for row, wanted in zip(inputs, targets)
        ])  # fmt: skip
    loops, found = model.config.loops, []
    cache = model.new_cache(len(tokens), inputs.shape[1], loops)
    for x, ctx in model.passes(inputs, cache):
        state = start = model.run_prelude(x, ctx)
        for _, after in model.iterate(start, start, ctx, range(1, loops + 1)):
            state = after
        assert ctx.view is not None
        logits = model.logits(model.coda_hidden(state, ctx)).transpose(1, 2)
        wanted = targets[:, cache.length : cache.length + x.shape[1]]
        found.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        ctx.view.advance()
    return torch.cat(found, 1)


def main() -> None:
    parser = options(steps=150, tokens=8192, length=1024, lr=2e-2, loops=4, window=128, block=64)
    parser.set_defaults(seeds=[0, 1])
    parser.add_argument("--text", nargs="+", choices=["moby dick", "speeches"],
                        default=["moby dick"])  # fmt: skip
    parser.add_argument("--names", nargs="+", choices=NAMES, default=list(NAMES))
    args = parser.parse_args()
    if args.check:
        args.steps, args.seeds, args.tokens, args.models = 3, [0], 4096, None
    print(f"kernels: {enable_fused()}", flush=True)
    settings = settings_in(args, "text", "names")
    rows = [] if args.check else rows_so_far(results_file("memory.stream"))
    done = {(row["text"], row["name"], row["seed"]) for row in rows}
    for text, seed, name in itertools.product(args.text, args.seeds, args.names):
        if (text, name, seed) in done:
            continue
        config = shape(name, args)
        torch.manual_seed(seed)
        model = LoopedTransformer(config)
        if config.has_memory:
            set_gates(model, name)
        learnt, held_out = prose(text)
        held_out = held_out[: 2 * PIECE] if args.check else held_out
        length = PIECE if name == "full attention" else args.length
        drawn = partial(draw, ids=learnt, rows=args.tokens // length, length=length)
        own = settings_of(args.steps, args.tokens // length, args.lr, seed)
        file = f"stream-{slug(text)}-{slug(name)}-{seed}-{args.steps}"
        train = partial(learn, model, drawn, own, f"{name}, {text}")
        learned = kept(args.models, file, model, train)
        ids = torch.from_numpy(held_out).long()
        pieces = ids[: len(ids) // PIECE * PIECE].view(-1, PIECE)
        in_pieces = losses(model, pieces)[:, args.window :]
        stream = None
        if config.has_memory:
            stream = float(losses(model, ids[None])[:, args.window :].mean())
        # Of a shut memory nothing is counted.
        alone = replace(config, memory="none", max_seq_len=min(config.memory_window, PIECE))
        counted = alone if name == "window alone" else config
        seen = PIECE / 2 if name == "full attention" else config.memory_window - args.block / 2
        rows.append({
            "text": text, "name": name, "seed": seed, "stream": stream,
            "in_pieces": float(in_pieces.mean()), "tokens": len(ids),
            "parameters": parameter_count(config),
            "flops_a_token": token_flops(counted, seen).at(args.loops),
            "state_bytes": state_bytes(counted, args.loops),
            "loss": round(learned.loss, 4), "training_seconds": round(learned.seconds),
        })  # fmt: skip
        print(rows[-1], flush=True)
        if not args.check:
            write("memory.stream", "loss of long texts past a window", rows, settings=settings)


if __name__ == "__main__":
    main()
