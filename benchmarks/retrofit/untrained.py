"""What later loops bring a pretrained model without any training: plain, damped, in half steps, and
by contrast.

With e for what enters the core and f(e) for what leaves it, i.e. the model itself:

    plain           s = f(s), once more or twice
    damped a        s = s + a (f(s) - s), from f(e) on
    half steps      `model.injection: half_steps`: s = f(e) / 2 + x / 2, where x goes from e by two
                    steps x = x + (f(x) - x) / 2 (arXiv 2605.23872); and what a third loop is then
    contrast w      log p = log p1 + (1 + w) (log p2 - log p1), from the plain second loop

Nats a token of held-out windows, in three kinds of text: *Moby Dick*, Python's documentation and
our own. Differences to the model itself are paired by window; the error is that of their mean. Half
of the windows choose, the other half report.

    OMP_NUM_THREADS=1 python -m benchmarks.retrofit.untrained --base smol [--windows 8]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.record import write
from looptx_core.checkpoint.folder import LoadedModel, load_model
from looptx_core.conversion.source_check import half_steps
from looptx_core.data.corpus import bundled_text

DAMPED, CONTRASTS = (0.5, 0.25), (-0.5, 0.25, 0.5)
ROOT = Path(__file__).parents[2]


def windows(loaded: LoadedModel, count: int, length: int) -> Iterator[Tensor]:
    """So many of each kind, spread over its text."""
    own = "\n".join(file.read_text("utf-8") for file in sorted(ROOT.glob("docs/**/*.md")))
    python = "\n".join(topics[name] for name in sorted(topics))
    for text in (bundled_text().read_text("utf-8"), python, own):
        ids = loaded.tokenizer.encode(text).ids
        for number in range(count):
            start = number * (len(ids) - length) // count
            yield torch.tensor([ids[start : start + length]])


@torch.inference_mode()
def losses(loaded: LoadedModel, ids: Tensor) -> dict[str, float]:
    """By scheme, nats a token."""
    model = loaded.model
    ctx = model.context(ids.shape[1])

    def run(state: Tensor) -> Tensor:
        for block in model.core:
            state = block(state, ctx)
        return state

    def scores(state: Tensor) -> Tensor:
        return model.logits(model.coda_hidden(state, ctx))[0, :-1].log_softmax(-1)

    def loss(log_p: Tensor) -> float:
        return float(F.nll_loss(log_p, ids[0, 1:]))

    def from_there(step: Callable[[Tensor], Tensor], start: Tensor, times: int) -> Tensor:
        for _ in range(times):
            start = step(start)
        return start

    first = model.embed(ids, ctx)
    once = run(first)
    log_p = scores(once)
    found = {"itself": loss(log_p)}
    for times in (1, 2):
        found[f"plain, {times + 1} loops"] = loss(scores(from_there(run, once, times)))
    for share in DAMPED:

        def damped(state: Tensor, share: float = share) -> Tensor:
            return state.lerp(run(state), share)

        for times in (1, 2):
            state = from_there(damped, once, times)
            found[f"damped {share}, {times + 1} loops"] = loss(scores(state))
    with half_steps(model):
        for loop, state in model.iterate(once, first, ctx, range(2, 4)):
            found[f"half steps, {loop} loops"] = loss(scores(state))
    twice = scores(run(once))
    for weight in CONTRASTS:
        mixed = log_p + (1 + weight) * (twice - log_p)
        found[f"contrast {weight}, 2 loops"] = loss(mixed.log_softmax(-1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="A converted model with a core.")
    parser.add_argument("--windows", type=int, default=16, help="Of each kind of text.")
    parser.add_argument("--length", type=int, default=384)
    args = parser.parse_args()
    loaded = load_model(args.base, dtype=torch.float32)
    each = [losses(loaded, ids) for ids in windows(loaded, args.windows, args.length)]
    rows = []
    for half, some in (("choose", each[::2]), ("report", each[1::2])):
        for scheme in each[0]:
            more = [own[scheme] - own["itself"] for own in some]
            error = statistics.stdev(more) / len(more) ** 0.5
            rows.append({
                "half": half, "scheme": scheme, "windows": len(some),
                "nats": round(statistics.mean(own[scheme] for own in some), 4),
                "more": round(statistics.mean(more), 4), "error": round(error, 4),
            })  # fmt: skip
            print(rows[-1], flush=True)
    write(
        "retrofit.untrained",
        "Loss of a pretrained model by later loops that were not trained.",
        rows, settings={"windows": args.windows, "length": args.length},
    )  # fmt: skip


if __name__ == "__main__":
    main()
