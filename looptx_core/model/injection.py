"""How what is looped gets its input back at every loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looptx_core.config.model import ModelConfig
from looptx_core.model.norm import RMSNorm
from looptx_core.model.weights import INIT_STD


class Gate(nn.Linear):
    """Shares between 0 and 1, computed from the streams of a token whatever their size is."""

    def forward(self, state: Tensor) -> Tensor:
        """(batch, length, width) -> (batch, length, shares)."""
        # RMSNorm after the product, which makes one pass less over a wide state.
        size = torch.linalg.vector_norm(state, dim=-1, keepdim=True).clamp(min=1e-6)
        scaled = F.linear(state, self.weight) * (math.sqrt(self.in_features) / size)
        return torch.sigmoid(scaled + self.bias)


class Injection(nn.Module):
    """Makes the core's input at each loop from the last state and the prelude's output.

    The result is (batch, length, d_model). The kinds are

    - `decay`: sigmoid(-a) * norm(state) + b * norm(embedding) with a and b per channel; the
      sigmoid is Parcae's exp(-softplus(a)). The share of an old state shrinks with every loop,
      and the norm bounds its size at any depth.
    - `bridge`: the embedding in the first loop, and embedding + W norm(state) in later ones, with W
      = 0 at first: a trained stack of layers stays itself at one loop, whatever W becomes, and at
      any number of loops until W is trained.
    - `norm`: g * embedding with g per channel in the first loop, and norm(state) in later ones, as
      in Nanbeige's looped stacks, which llama.cpp runs. The prelude's output does not come again.
      g starts at 1 / `INIT_STD`, so that new embeddings enter at the size of a normed state.
    - `half_steps`: the embedding in the first loop; a later one reads the mean x of embedding and
      state, takes half a step from there, y = (x + core(x)) / 2, and the next state is the mean of
      y and the last one (arXiv 2605.23872 with two steps). There is nothing to train: the second
      loop stays near the first, whatever the core is.
    - `add`: norm(state) + norm(embedding), for ablations.
    - `streams`: hyper-connections between loops (Hyperloop, arXiv 2604.21254). The state is n
      streams side by side, (batch, length, n * d_model), which all begin as the prelude's output.
      The core reads a weighted sum of them, normalised; each stream then keeps a share of itself
      and takes a share of the core's output; and their mean is read out. Gates compute the weights
      from a token's streams. They start as constants: the first loop reads norm(embedding), as
      with `decay`, and stream i of n keeps (i - 1/2) / n and takes the rest, so that some hold the
      input for long and others the latest output.
    - `none`: the state as it is.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.injection
        if self.kind in ("none", "half_steps"):
            return
        self.state_norm = RMSNorm(config.d_model, config.norm_eps)
        if self.kind == "streams":
            self.streams = config.streams
            self.read = Gate(config.state_width, self.streams)
            self.write = Gate(config.state_width, 2 * self.streams)
            return
        if self.kind == "bridge":
            self.bridge = nn.Linear(config.d_model, config.d_model, bias=False)
            return
        if self.kind == "norm":
            self.gain = nn.Parameter(torch.ones(config.d_model))
            return
        self.embedding_norm = RMSNorm(config.d_model, config.norm_eps)
        if self.kind == "decay":
            kept = config.retain
            self.decay = nn.Parameter(torch.full((config.d_model,), math.log((1 - kept) / kept)))
            self.gain = nn.Parameter(torch.full((config.d_model,), 1 - kept))

    def forward(self, state: Tensor, embedding: Tensor, loop: int | Tensor) -> Tensor:
        """state: (batch, length, config.state_width). embedding: (batch, length, d_model). loop:
        the one that is entered, from 1; or (batch,), each row's own."""
        if self.kind == "none":
            return state
        if self.kind == "streams":
            shares = self.read(state)[..., None, :]
            return self.state_norm((shares @ self._apart(state)).squeeze(-2))
        if self.kind in ("bridge", "norm", "half_steps"):
            return _by_loop(
                loop,
                lambda: self._first(state, embedding),
                lambda: self._later(state, embedding),
            )
        state, embedding = self.state_norm(state), self.embedding_norm(embedding)
        if self.kind == "add":
            return state + embedding
        return torch.sigmoid(-self.decay) * state + self.gain * embedding

    def open(self, state: Tensor) -> Tensor:
        """The state before the first loop, from the prelude's output or from itself."""
        if self.kind != "streams" or state.shape[-1] > self.state_norm.width:
            return state
        return state.repeat(1, 1, self.streams)

    def after(self, state: Tensor, embedding: Tensor, output: Tensor, loop: int | Tensor) -> Tensor:
        """The next state. state: before the loop. output: the core's, (batch, length, d_model).
        embedding, loop: as in `forward`."""
        if self.kind == "half_steps":
            return _by_loop(
                loop,
                lambda: output,
                lambda: _mean(state, _mean(self._later(state, embedding), output)),
            )
        if self.kind != "streams":
            return output
        kept, taken = self.write(state)[..., None].chunk(2, -2)
        mixed = torch.addcmul(kept * self._apart(state), 2 * taken, output[..., None, :])
        return mixed.flatten(-2)

    @torch.no_grad()
    def reset(self) -> None:
        """What `draw_weights` leaves to be set: a bridge and gates start as constants."""
        if self.kind == "bridge":
            nn.init.zeros_(self.bridge.weight)
        if self.kind == "streams":
            kept = (torch.arange(self.streams) + 0.5) / self.streams
            for gate, shares in (
                (self.read, torch.full((self.streams,), 1 / self.streams)),
                (self.write, torch.cat([kept, (1 - kept) / 2])),
            ):
                nn.init.zeros_(gate.weight)
                gate.bias.copy_(torch.logit(shares))

    @property
    def embedding_scale(self) -> Tensor:
        """norm: what the embedding is multiplied by in the first loop, (d_model,)."""
        return self.gain / INIT_STD

    def _first(self, state: Tensor, embedding: Tensor) -> Tensor:
        """What the core reads in the first loop."""
        return embedding * self.embedding_scale if self.kind == "norm" else embedding

    def _later(self, state: Tensor, embedding: Tensor) -> Tensor:
        """What the core reads from the second loop on."""
        if self.kind == "half_steps":
            return _mean(embedding, state)
        state = self.state_norm(state)
        return state if self.kind == "norm" else embedding + self.bridge(state)

    def _apart(self, state: Tensor) -> Tensor:
        return state.unflatten(-1, (self.streams, -1))


def _by_loop(
    loop: int | Tensor, first: Callable[[], Tensor], later: Callable[[], Tensor]
) -> Tensor:
    """What the first loop has, or a later one; each row's own where `loop` is (batch,)."""
    if isinstance(loop, int):
        return later() if loop > 1 else first()
    return torch.where((loop > 1).view(-1, 1, 1), later(), first())


def _mean(a: Tensor, b: Tensor) -> Tensor:
    return (a + b) / 2


def read_out(state: Tensor, width: int) -> Tensor:
    """A state as it is read: the mean of its streams, (..., width), or itself where it has none."""
    return state if state.shape[-1] == width else state.unflatten(-1, (-1, width)).mean(-2)
