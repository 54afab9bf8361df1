"""Lines that need depth: follow a table for p hops.

    ad fc be da cf eb: a1d c3a b2b e4d

The table sends each letter to another (`ad`: a to d); a query `c3a` says that three steps from
`c` lead to `a`. It is p-hop induction (Saunshi et al., arXiv 2502.17416) with the induction's first
step, finding what followed a token, put into one token, so that a model of a million parameters
learns it in minutes. One block can follow about one hop, so p hops take depth, and a loop is
where a small model gets it from.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from looptx_core.data.probes import Probe

LETTERS = "abcdefgh"
MAX_HOPS = 6
_QUERIES = 20
_TOWARDS_FEW = 1.6  # exponent: fewer hops come more often, as the deeper ones build on them


def hop_line(rng: np.random.Generator, hops: int | None = None) -> Probe:
    """One line, its answers marked; `hops` for every query, or drawn, fewer more often."""
    size = len(LETTERS)
    table = rng.integers(0, size, size)
    pairs = " ".join(LETTERS[k] + LETTERS[table[k]] for k in rng.permutation(size))
    text = f"{pairs}:"
    answers = []
    for query in rng.integers(0, size, _QUERIES):
        steps = hops or 1 + int(rng.random() ** _TOWARDS_FEW * MAX_HOPS)
        place = query
        for _ in range(steps):
            place = table[place]
        text += f" {LETTERS[query]}{steps}{LETTERS[place]}"
        answers.append((len(text) - 1, len(text)))
    return Probe(f"{hops} hops", text, answers)


def hop_lines(seed: int, count: int) -> Iterator[str]:
    """Training lines, p from 1 to `MAX_HOPS` mixed in each."""
    rng = np.random.default_rng((seed, 0))
    for _ in range(count):
        yield hop_line(rng).text


def hop_probes(seed: int, each: int) -> Iterator[Probe]:
    """Held-out lines, `each` of every p; another stream of tables than training's."""
    rng = np.random.default_rng((seed, 1))
    for hops in range(1, MAX_HOPS + 1):
        for _ in range(each):
            yield hop_line(rng, hops)
