"""What the benchmarks of decoding share: sides that alternate, and held-out texts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import looptx_core
from looptx_core.data.bundled import bundled_shards
from looptx_core.data.hops import hop_line
from looptx_core.data.shards import open_shards
from looptx_core.data.tokenizer import end_id

BUNDLED = Path(looptx_core.__file__).parent / "assets" / "model"


def alternate(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, float]]:
    """Tokens per second of each side, medians over rounds; the first round warms up.

    `cpu`: by the process's own seconds, which a busy machine disturbs less. With one thread the
    two mean the same on a quiet machine.
    """
    wall: dict[str, list[float]] = {name: [] for name in runs}
    own: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            began, cpu = time.perf_counter(), time.process_time()
            tokens = run()
            cpu, seconds = time.process_time() - cpu, time.perf_counter() - began
            if number:
                wall[name].append(tokens / seconds)
                own[name].append(tokens / cpu)
    return {
        name: {"tokens_per_second": statistics.median(wall[name]),
               "cpu": statistics.median(own[name])}
        for name in runs
    }  # fmt: skip


def held_out(
    vocab_size: int,
    count: int,
    length: int,
    tokenizer: Tokenizer | None = None,
    data: Path | None = None,
) -> list[list[int]]:
    """Parts of held-out pieces that are prose, as token ids.

    data: shards; by default the bundled text's, with so many token types.
    tokenizer: the model's, where it was not trained on that text; they are then as long or shorter.
    """
    shards = open_shards(data or bundled_shards(vocab_size))
    tokens = shards.tokens("val")
    stream = np.asarray(tokens.read(0, len(tokens)))
    ends = np.flatnonzero(stream == end_id(shards.tokenizer))
    starts = [0, *(ends + 1).tolist()]
    pieces = [stream[a:b].tolist() for a, b in zip(starts, [*ends.tolist(), len(stream)])]
    long = [p[i : i + length] for p in pieces for i in range(0, len(p) - length + 1, length)]
    prose = [p for p in long if not shards.tokenizer.decode(p).lstrip().startswith("map ")]
    chosen = [prose[i] for i in np.linspace(0, len(prose) - 1, count).astype(int)]
    if tokenizer is None:
        return chosen
    texts = [shards.tokenizer.decode(piece) for piece in chosen]
    return [tokenizer.encode(text, add_special_tokens=False).ids[:length] for text in texts]


def hop_texts(count: int, seed: int = 5) -> list[str]:
    """Held-out lines that need depth: another stream than training's."""
    rng = np.random.default_rng((seed, 3))
    return [hop_line(rng)[0] for _ in range(count)]
