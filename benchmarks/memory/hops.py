"""Do loops hop over what a memory holds?

The arrows of a ring of symbols come first, in random order; then prose, far more than the window
holds; then queries: where do one, two or three arrows lead from this symbol? No arrow is in sight
by then, so each hop is a reading of the memory, and a loop reads it once. A model trained at four
loops is read out after one to four of them; another is trained at one loop, on as many rows.

    python -m benchmarks.memory.hops [--kinds delta] [--loops 4 1] [--seeds 0] [--check]

Prose is Moby Dick's: its first four fifths while training, a hundred tokens of it, and 8,000
tokens of the last fifth when asked. Resumable: what stands in the record is not repeated. On one
core four loops train in fifteen minutes, one in six; 20 texts are read in seconds. `--check` trains
three steps and leaves no record.
"""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import torch

from benchmarks.common.record import results_file, rows_so_far, slug, write
from benchmarks.memory.learning import (
    KINDS,
    NEAR,
    cuttings,
    kept,
    learn,
    options,
    prose,
    read,
    set_gates,
    settings_in,
    settings_of,
    vocabulary,
)
from looptx_core.config.model import ModelConfig
from looptx_core.model.fused import enable_fused
from looptx_core.model.loop import LoopedTransformer

HOPS = 3


class Rings:
    """Rows of arrows, prose and queries, with the ids of what is beside prose.

    An arrow is one id for each pair of symbols; a query is one for each number of hops and symbol,
    and what follows it is the symbol where they lead.
    """

    def __init__(self, symbols: int) -> None:
        self.symbols = symbols
        self.arrow = vocabulary()
        self.query = self.arrow + symbols * symbols
        self.symbol = self.query + HOPS * symbols
        self.vocab = self.symbol + symbols

    def arrows(self, rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids, (rows, symbols), and where 1 to `HOPS` arrows lead, (rows, HOPS, symbols)."""
        ring, order = (
            rng.permuted(np.tile(np.arange(self.symbols), (rows, 1)), axis=1) for _ in range(2)
        )
        leads = np.empty((rows, HOPS, self.symbols), dtype=np.int64)
        for hops in range(HOPS):
            np.put_along_axis(leads[:, hops], ring, np.roll(ring, -hops - 1, axis=1), axis=1)
        ends = np.take_along_axis(leads[:, 0], order, axis=1)
        return self.arrow + order * self.symbols + ends, leads

    def queries(
        self, rng: np.random.Generator, leads: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, each query's hops less one, and the symbol where they lead, all (rows, count)."""
        hops = rng.integers(HOPS, size=(len(leads), count))
        starts = rng.integers(self.symbols, size=(len(leads), count))
        ends = leads[np.arange(len(leads))[:, None], hops, starts]
        return self.query + hops * self.symbols + starts, hops, ends

    def draw(
        self, rng: np.random.Generator, done: float, rows: int, length: int, queries: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What to train on, see `learning.Draw`."""
        if done < NEAR:
            rows, length = 2 * rows, self.symbols + queries
        ids, leads = self.arrows(rng, rows)
        asked, _, targets = self.queries(rng, leads, queries)
        between = cuttings(rng, prose()[0], rows, length - ids.shape[1] - asked.shape[1])
        tokens = torch.from_numpy(np.concatenate([ids, between, asked], axis=1))
        # Targets are no part of what is read, as they would tell the next query.
        labels, weights = torch.zeros_like(tokens), torch.zeros(tokens.shape)
        labels[:, -queries:], weights[:, -queries:] = torch.from_numpy(self.symbol + targets), 1.0
        return tokens, labels, weights

    @torch.inference_mode()
    def accuracy(
        self, model: LoopedTransformer, between: int, rows: int, seed: int
    ) -> list[list[float]]:
        """The share of right answers after so many tokens of held-out prose, by loop and hops."""
        rng, loops = np.random.default_rng((seed, 2)), model.config.loops
        ids, leads = self.arrows(rng, rows)
        text = np.concatenate([ids, cuttings(rng, prose()[1], rows, between)], axis=1)
        asked, hops, targets = self.queries(rng, leads, model.config.memory_window // 2)
        cache = model.new_cache(rows, text.shape[1] + asked.shape[1], loops)
        read(model, torch.from_numpy(text), cache, loops)
        found: list[list[torch.Tensor]] = [[] for _ in range(loops)]
        for x, ctx in model.passes(torch.from_numpy(asked), cache):
            start = model.run_prelude(x, ctx)
            for loop, state in model.iterate(start, start, ctx, range(1, loops + 1)):
                found[loop - 1].append(model.logits(model.coda_hidden(state, ctx)))
            assert ctx.view is not None
            ctx.view.advance()
        shares = []
        for parts in found:
            logits = torch.cat(parts, 1)[:, :, self.symbol :]
            right = logits.argmax(-1).numpy() == targets
            shares.append([round(float(right[hops == n].mean()), 4) for n in range(HOPS)])
        return shares


def main() -> None:
    parser = options(
        steps=3000, batch=16, length=160, symbols=12, lr=1e-2, width=64, window=64, block=32,
        between=8000, rows=20,
    )  # fmt: skip
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["delta"])
    parser.add_argument("--loops", nargs="+", type=int, default=[4, 1])
    args = parser.parse_args()
    if args.check:
        args.steps, args.between, args.rows, args.models = 3, 300, 2, None
    print(f"kernels: {enable_fused()}", flush=True)
    settings = settings_in(args, "kinds", "loops")
    rings = Rings(args.symbols)
    draw = partial(rings.draw, rows=args.batch, length=args.length, queries=args.window // 2)
    rows = [] if args.check else rows_so_far(results_file("memory.hops"))
    done = {(row["kind"], row["loops"], row["seed"]) for row in rows}
    for kind, loops, seed in itertools.product(args.kinds, args.loops, args.seeds):
        if (kind, loops, seed) in done:
            continue
        torch.manual_seed(seed)
        model = LoopedTransformer(ModelConfig(
            vocab_size=rings.vocab, d_model=args.width, n_heads=2, n_kv_heads=2,
            head_dim=args.width // 2, d_ff=2 * args.width, prelude_layers=1, core_layers=1,
            coda_layers=0, max_loops=loops, loops=loops, memory_window=args.window,
            memory_block=args.block, **KINDS[kind],
        ))  # fmt: skip
        set_gates(model, kind)
        own = settings_of(args.steps, args.batch, args.lr, seed)
        name = f"hops-{slug(kind)}-{loops}-{seed}-{args.steps}"
        train = partial(learn, model, draw, own, f"{kind}, {loops} loops")
        learned = kept(args.models, name, model, train)
        found = rings.accuracy(learned.model, args.between, args.rows, seed)
        print(f"{kind}, {loops} loops, seed {seed}, by loop and hops: {found}", flush=True)
        rows.append({
            "kind": kind, "loops": loops, "seed": seed, "accuracy_by_loop_and_hops": found,
            "loss": round(learned.loss, 4), "training_seconds": round(learned.seconds),
        })  # fmt: skip
        if not args.check:
            write("memory.hops", "hops over arrows that only a memory holds", rows,
                  settings=settings)  # fmt: skip


if __name__ == "__main__":
    main()
