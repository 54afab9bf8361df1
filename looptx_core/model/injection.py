"""How what is looped gets its input back at every loop."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from looptx_core.config.model import ModelConfig
from looptx_core.model.norm import RMSNorm


class Injection(nn.Module):
    """Makes the core's input at each loop from the last state and the prelude's output.

    Both are (batch, length, d_model), and so is the result. The kinds are

    - `decay`: sigmoid(-a) * norm(state) + b * norm(embedding) with a and b per channel; the
      sigmoid is Parcae's exp(-softplus(a)). The share of an old state shrinks with every loop,
      and the norm bounds its size at any depth.
    - `bridge`: the embedding in the first loop, and embedding + W norm(state) in later ones, with W
      = 0 at first: a trained stack of layers stays itself at one loop, whatever W becomes, and at
      any number of loops until W is trained.
    - `add`: norm(state) + norm(embedding), for ablations.
    - `none`: the state as it is.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.injection
        if self.kind == "none":
            return
        self.state_norm = RMSNorm(config.d_model, config.norm_eps)
        if self.kind == "bridge":
            self.bridge = nn.Linear(config.d_model, config.d_model, bias=False)
            return
        self.embedding_norm = RMSNorm(config.d_model, config.norm_eps)
        if self.kind == "decay":
            kept = config.retain
            self.decay = nn.Parameter(torch.full((config.d_model,), math.log((1 - kept) / kept)))
            self.gain = nn.Parameter(torch.full((config.d_model,), 1 - kept))

    def forward(self, state: Tensor, embedding: Tensor, loop: int | Tensor) -> Tensor:
        """state, embedding: (batch, length, d_model). loop: the one that is entered, from 1; or
        (batch,), each row's own."""
        if self.kind == "none":
            return state
        if self.kind == "bridge":
            if isinstance(loop, int):
                return embedding if loop == 1 else embedding + self.bridge(self.state_norm(state))
            later = (loop > 1).view(-1, 1, 1)
            return embedding + self.bridge(self.state_norm(state)).where(later, 0)
        state, embedding = self.state_norm(state), self.embedding_norm(embedding)
        if self.kind == "add":
            return state + embedding
        return torch.sigmoid(-self.decay) * state + self.gain * embedding
