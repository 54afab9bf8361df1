"""p-hop induction: follow an induction head p times (Sanford et al., arXiv 2402.09268).

With find(i) = max{j <= i : v[j-1] = v[i]}, the place after the last earlier occurrence of the
symbol at i, the answer at i is v[find(find(...find(i)))], p times. Saunshi et al. (arXiv
2502.17416) take it as the task where looped layers replace distinct ones.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""The target where a chain leads out of the sequence; `cross_entropy`'s own default."""


def p_hop(values: np.ndarray, hops: np.ndarray) -> np.ndarray:
    """The answer at every position, `IGNORED` where there is none.

    values: (batch, length) symbols from 0 up. hops: (batch,), p of each row.
    """
    batch, length = values.shape
    rows = np.arange(batch)
    after = np.full((batch, values.max() + 1), -1)  # by symbol: the place after its last sighting
    found = np.empty_like(values)
    for place in range(length):
        if place:
            after[rows, values[:, place - 1]] = place
        found[:, place] = after[rows, values[:, place]]
    where = np.broadcast_to(np.arange(length), values.shape)
    for hop in range(hops.max()):
        further = np.where(where >= 0, np.take_along_axis(found, np.maximum(where, 0), 1), -1)
        where = np.where(hop < hops[:, None], further, where)
    answers = np.take_along_axis(values, np.maximum(where, 0), 1)
    return np.where(where >= 0, answers, IGNORED)


def p_hop_batch(
    rng: np.random.Generator, batch: int, length: int, max_hops: int, symbols: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Random sequences with p drawn per sequence from 1..max_hops.

    Returns tokens (batch, 1 + length), the first of them p's own symbol (`symbols` + p - 1);
    targets of the same shape, `IGNORED` at p and where there is no answer; p, (batch,).
    """
    hops = rng.integers(1, max_hops + 1, batch)
    values = rng.integers(0, symbols, (batch, length))
    tokens = np.concatenate([symbols + hops[:, None] - 1, values], 1)
    answers = np.concatenate([np.full((batch, 1), IGNORED), p_hop(values, hops)], 1)
    return torch.from_numpy(tokens), torch.from_numpy(answers), torch.from_numpy(hops)
