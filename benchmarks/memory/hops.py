"""Do loops hop over what a memory holds?

The arrows of a ring of symbols come first, in random order; then prose, far more than the window
holds; then symbols: where do four arrows lead from each? No arrow is in sight by then, so each hop
is a reading of the memory, and a loop reads it once. A model of four loops is taught that loop n
answers n hops; another, of one loop, is taught three of them by the same rows, and a third has four
loops and no memory.

    python -m benchmarks.memory.hops [--kinds delta "window alone"] [--loops 4 1] [--seeds 0 1]
        [--check]

Hops are learned in lessons, from a few arrows in sight to a ring behind prose. In most of them some
symbols are asked by the ids of answers, so that what is read can itself be asked: without this, and
without an answer for each loop, two hops over a memory came to 38 %, and three stayed at chance.

Prose is Moby Dick's: its first four fifths while training, and 8,000 tokens of the last fifth when
asked. Resumable: what stands in the record is not repeated. Four loops train in some five minutes
of a core. `--check` trains three steps of a lesson and leaves no record.
"""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common.record import results_file, rows_so_far, slug, write
from benchmarks.memory.learning import (
    KINDS,
    Learned,
    cuttings,
    kept,
    options,
    prose,
    read,
    set_gates,
    settings_in,
    vocabulary,
)
from looptx_core.config.model import ModelConfig
from looptx_core.config.run import TrainConfig
from looptx_core.model.fused import enable_fused
from looptx_core.model.loop import LoopedTransformer
from looptx_core.training.optimizer import (
    build_optimizer,
    clip_by_part,
    learning_rate_factor,
)

HOPS = 4
ASKED = 3
"""Of a model of one loop."""


class Lesson(NamedTuple):
    """Rows of one kind, for so many steps."""

    steps: int
    rows: int
    ring: tuple[int, int]
    """The fewest and the most arrows."""
    between: tuple[int, int]
    """The fewest and the most tokens of prose."""
    queries: int
    chained: float
    """The share of queries that are asked by the ids of answers."""
    hops: int
    """Those that are taught: loop n is told where n arrows lead."""


LESSONS = (
    Lesson(150, 64, (3, 4), (0, 0), 4, 0.0, 1),
    Lesson(400, 32, (5, 8), (0, 0), 8, 0.7, 1),
    Lesson(300, 32, (5, 8), (0, 0), 8, 0.7, HOPS),
    Lesson(150, 24, (8, 12), (0, 0), 12, 0.7, HOPS),
    Lesson(600, 16, (12, 12), (20, 40), 31, 0.7, HOPS),
    Lesson(300, 16, (12, 12), (60, 120), 31, 0.7, HOPS),
)


class Rings:
    """Rows of arrows, prose and queries, with the ids of what is beside prose.

    An arrow is one id for each pair of symbols. A query is the symbol from which arrows are
    followed; in its place the answer is read out.
    """

    def __init__(self, symbols: int) -> None:
        self.symbols = symbols
        self.arrow = vocabulary()
        self.answer = self.arrow + symbols * symbols
        self.query = self.answer + symbols
        self.asks = self.query + symbols
        self.vocab = self.asks + 1

    def arrows(
        self, rng: np.random.Generator, rows: int, size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, (rows, size); the symbols, in the ring's order; and where 1 to `HOPS` arrows lead,
        (rows, HOPS, symbols)."""
        every = np.tile(np.arange(self.symbols), (rows, 1))
        ring = rng.permuted(every, axis=1)[:, :size]
        leads = np.zeros((rows, HOPS, self.symbols), dtype=np.int64)
        for hops in range(HOPS):
            np.put_along_axis(leads[:, hops], ring, np.roll(ring, -hops - 1, axis=1), axis=1)
        order = rng.permuted(ring, axis=1)
        ends = np.take_along_axis(leads[:, 0], order, axis=1)
        return self.arrow + order * self.symbols + ends, ring, leads

    def queries(
        self,
        rng: np.random.Generator,
        ring: np.ndarray,
        leads: np.ndarray,
        count: int,
        chained: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids, (rows, 1 + count), the first of which says that queries follow, and where the
        arrows lead from each, (HOPS, rows, count)."""
        rows = len(ring)
        starts = np.take_along_axis(ring, rng.integers(ring.shape[1], size=(rows, count)), 1)
        first = np.where(rng.random(starts.shape) < chained, self.answer, self.query)
        asked = np.concatenate([np.full((rows, 1), self.asks), first + starts], axis=1)
        return asked, np.stack([np.take_along_axis(way, starts, 1) for way in leads.swapaxes(0, 1)])

    def draw(self, rng: np.random.Generator, lesson: Lesson) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of a lesson, (rows, length), and the answers to its queries, (HOPS, rows, count)."""
        size = int(rng.integers(lesson.ring[0], lesson.ring[1] + 1))
        between = int(rng.integers(lesson.between[0], lesson.between[1] + 1))
        ids, ring, leads = self.arrows(rng, lesson.rows, size)
        asked, ways = self.queries(rng, ring, leads, lesson.queries, lesson.chained)
        text = cuttings(rng, prose()[0], lesson.rows, between)
        return torch.from_numpy(np.concatenate([ids, text, asked], 1)), torch.from_numpy(ways)

    @torch.inference_mode()
    def accuracy(
        self, model: LoopedTransformer, between: int, rows: int, seed: int
    ) -> list[list[float]]:
        """The share of answers, after so many tokens of held-out prose, that are where 1 to `HOPS`
        arrows lead; by loop."""
        rng, loops = np.random.default_rng((seed, 2)), model.config.loops
        ids, ring, leads = self.arrows(rng, rows, self.symbols)
        text = np.concatenate([ids, cuttings(rng, prose()[1], rows, between)], axis=1)
        count = model.config.memory_window // 2
        asked, ways = self.queries(rng, ring, leads, count, 0.0)
        cache = model.new_cache(rows, text.shape[1] + asked.shape[1], loops)
        read(model, torch.from_numpy(text), cache, loops)
        found: list[list[torch.Tensor]] = [[] for _ in range(loops)]
        for x, ctx in model.passes(torch.from_numpy(asked), cache):
            start = model.run_prelude(x, ctx)
            for loop, state in model.iterate(start, start, ctx, range(1, loops + 1)):
                found[loop - 1].append(model.logits(model.coda_hidden(state, ctx)))
            assert ctx.view is not None
            ctx.view.advance()
        given = [
            torch.cat(parts, 1)[:, 1:, self.answer : self.query].argmax(-1).numpy()
            for parts in found
        ]
        return [[round(float((own == way).mean()), 4) for way in ways] for own in given]


def learn(
    model: LoopedTransformer, rings: Rings, settings: TrainConfig, lessons: tuple[Lesson, ...],
    name: str,
) -> Learned:  # fmt: skip
    """Train on the lessons in turn; a model of one loop is taught `ASKED` hops where there are as
    many."""
    model.train()
    optimizer = build_optimizer(model, settings)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(settings))
    rng = np.random.default_rng((settings.seed, 1))
    began, losses = time.process_time(), []
    for number, lesson in enumerate(lessons, start=1):
        loops = min(lesson.hops, model.config.loops)
        first_taught = min(lesson.hops, ASKED) - 1 if model.config.loops == 1 else 0
        for _ in range(lesson.steps):
            tokens, ways = rings.draw(rng, lesson)
            ctx, first = model.context(tokens.shape[1]), tokens.shape[1] - lesson.queries
            each = []
            for state, way in zip(model.states(tokens, loops, ctx), ways[first_taught:]):
                logits = model.logits(model.coda_hidden(state[:, first:], ctx))
                each.append(F.cross_entropy(logits.flatten(0, 1), rings.answer + way.flatten()))
            optimizer.zero_grad()
            torch.stack(each).mean().backward()
            clip_by_part(model, 1.0)
            optimizer.step()
            rates.step()
            losses.append(float(each[-1].detach()))
        seconds = time.process_time() - began
        print(f"  {name}, lesson {number}: {np.mean(losses[-50:]):.3f} nats, {seconds:.0f} s",
              flush=True)  # fmt: skip
    return Learned(model.eval(), float(np.mean(losses[-50:])), time.process_time() - began)


def main() -> None:
    parser = options(lr=1e-2, symbols=12, width=64, window=32, block=16, between=8000, rows=20)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS),
                        default=["delta", "window alone"])  # fmt: skip
    parser.add_argument("--loops", nargs="+", type=int, default=[HOPS, 1])
    args = parser.parse_args()
    lessons = LESSONS
    if args.check:
        args.between, args.rows, args.models = 300, 2, None
        lessons = (LESSONS[-1]._replace(steps=3),)
    print(f"kernels: {enable_fused()}", flush=True)
    settings = settings_in(args, "kinds", "loops")
    rings = Rings(args.symbols)
    rows = [] if args.check else rows_so_far(results_file("memory.hops"))
    done = {(row["kind"], row["loops"], row["seed"]) for row in rows}
    for seed, kind, loops in itertools.product(args.seeds, args.kinds, args.loops):
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
        own = TrainConfig(
            steps=sum(lesson.steps for lesson in lessons), lr=args.lr, seed=seed,
            optimizer="adamw", weight_decay=0.0, lr_schedule="wsd", lr_decay=0.2,
        )  # fmt: skip
        name = f"{kind}, {loops} loops, seed {seed}"
        learned = kept(
            args.models, f"hops-{slug(kind)}-{loops}-{seed}", model,
            partial(learn, model, rings, own, lessons, name),
        )  # fmt: skip
        found = rings.accuracy(learned.model, args.between, args.rows, seed)
        print(f"{name}, by loop and hops: {found}", flush=True)
        rows.append({
            "kind": kind, "loops": loops, "seed": seed, "accuracy_by_loop_and_hops": found,
            "loss": round(learned.loss, 4), "training_seconds": round(learned.seconds),
        })  # fmt: skip
        if not args.check:
            write("memory.hops", "hops over arrows that only a memory holds", rows,
                  settings=settings)  # fmt: skip


if __name__ == "__main__":
    main()
