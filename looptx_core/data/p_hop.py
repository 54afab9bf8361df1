"""p-hop induction: follow an induction head p times (Sanford et al., arXiv 2402.09268).

With find(i) = max{j <= i : v[j-1] = v[i]}, the place after the last earlier occurrence of the
symbol at i, the answer at i is v[find(find(...find(i)))], p times. Saunshi et al. (arXiv
2502.17416) take it as the task where looped layers replace distinct ones.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The target where a chain leads out of the sequence; `cross_entropy`'s own default."""


def p_hop(values: Tensor, hops: Tensor) -> Tensor:
    """The answer at every position, `IGNORED` where there is none.

    values: (batch, length) symbols from 0 up. hops: (batch,), p of each row.
    """
    places = torch.arange(values.shape[1], device=values.device)
    before = F.pad(values[:, :-1], (1, 0), value=-1)
    symbols = torch.arange(int(values.max()) + 1, device=values.device)
    # By symbol and position: the place after its last sighting.
    after = torch.where(before[:, None] == symbols[:, None], places, -1).cummax(-1).values
    found = after.gather(1, values[:, None])[:, 0]
    where = places.expand_as(values)
    for hop in range(int(hops.max())):
        further = torch.where(where >= 0, found.gather(1, where.clamp(min=0)), -1)
        where = torch.where(hop < hops[:, None], further, where)
    answers = values.gather(1, where.clamp(min=0))
    return torch.where(where >= 0, answers, IGNORED)


def p_hop_batch(
    rng: np.random.Generator,
    batch: int,
    length: int,
    max_hops: int,
    symbols: int = 4,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Random sequences with p drawn per sequence from 1..max_hops.

    Returns tokens (batch, 1 + length), the first of them p's own symbol (`symbols` + p - 1);
    targets of the same shape, `IGNORED` at p and where there is no answer; p, (batch,). The same
    numbers on every device.
    """
    drawn = rng.integers(1, max_hops + 1, batch), rng.integers(0, symbols, (batch, length))
    hops, values = (torch.from_numpy(part).to(device) for part in drawn)
    tokens = torch.cat([symbols + hops[:, None] - 1, values], 1)
    return tokens, F.pad(p_hop(values, hops), (1, 0), value=IGNORED), hops
